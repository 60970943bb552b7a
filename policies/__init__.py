"""When to freeze. A policy takes one observation of a session and decides; how to freeze is the gateway's business.

`contract.py` says what a policy is, `loader.py` how one is found by its name. This package imports nothing
of `gateway`.
"""
