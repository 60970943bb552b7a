"""Policies decide when to freeze: each takes one observation of a session. How to freeze is the gateway's business.

`contract.py` says what a policy is, `loader.py` how one is found by its name. This package imports nothing
of `gateway`.
"""
