"""The whole stack on one machine: what `cwg up` starts, watches and stops."""
