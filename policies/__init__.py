"""When to freeze. A policy takes an observation of a session and decides; how to freeze is the gateway's business.

There is none yet: windows are frozen when somebody asks. This package imports nothing of `gateway`.
"""
