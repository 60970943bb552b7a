"""The local stack's one exception; `cwg` prints its text as a single line and exits with 1."""


class StackError(Exception):
    """Why the stack cannot start or continue, and what to do about it."""
