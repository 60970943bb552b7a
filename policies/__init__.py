"""Policies decide when to freeze a session; the gateway does the freezing.

`contract.py` defines what a policy is, `loader.py` finds one by its name. This package imports nothing of `gateway`.
"""
