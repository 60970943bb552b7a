"""docs/errors.md, generated from the table of codes and from the routes: `make docs` writes it."""

from gateway.api.admin.routes import OPERATIONS
from gateway.errors import CODES, Code
from tests.support.gateway_process import ROOT

PAGE = ROOT / "docs" / "errors.md"
_HEAD = """\
# Errors

Generated from the code by `make docs`. In the admin API, and as the result of an MCP tool, an error is

```json
{"error": {"code": "...", "message": "...", "hint": "...", "retryable": false, "details": {}}}
```

`message` says what is wrong and names the field, `hint` what to do about it, in the words of the API: the admin API
names routes, MCP its tools, and `cwg` its commands. `retryable`: the same request may succeed later. At `/v1` errors of
the gateway have the same `code`, in the shape of the client's API; errors of the engine pass untouched.

| code | status | retryable | what it means | what to do | admin routes |
|---|---:|---|---|---|---|
"""
_MANY = 6  # routes that are named one by one


def page() -> str:
    """The page as it should be."""
    return _HEAD + "".join(_row(name, code) for name, code in CODES.items())


def _row(name: str, code: Code) -> str:
    again = "yes" if code.retryable else ""
    return f"| `{name}` | {code.status} | {again} | {code.means} | {code.remedy} | {_routes(name)} |\n"


def _routes(name: str) -> str:
    found = [f"`{one.method} {one.path}`" for one in OPERATIONS if name in one.codes]
    return ", ".join(found) if len(found) <= _MANY else "all" if len(found) == len(OPERATIONS) else "many"


if __name__ == "__main__":
    PAGE.write_text(page())
