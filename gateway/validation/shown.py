"""Values from outside in an error message."""

import reprlib
from itertools import islice
from typing import Any

_LONGEST = 100
_MOST = 3


class _Shown(reprlib.Repr):
    """`repr` of only the first few parts of a value, however large or deeply nested it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = self.maxlist = self.maxtuple = _MOST
        self.maxstring = self.maxother = self.maxlong = _LONGEST

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """As the base class, which sorts all keys first."""
        if level <= 0:
            return "{...}"
        parts = [f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in islice(x.items(), _MOST)]
        return f"{{{', '.join(parts)}{', ...' if len(x) > _MOST else ''}}}"


def shown(value: object, longest: int = _LONGEST) -> str:
    """Return the beginning of a value's `repr`, in the same short time for any value.

    A plain f"{value!r:.100}" writes all of it first: minutes for a large value, RecursionError for a deep one.
    """
    text = _Shown().repr(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
