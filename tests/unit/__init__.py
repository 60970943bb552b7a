"""Tests of single modules: no process is started."""
