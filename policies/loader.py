"""Load policies, built-in and custom ones, from an import string."""

import difflib
import importlib
import inspect
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from policies.contract import Policy, abbreviated

BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "idle_timeout": "policies.idle_timeout:IdleTimeout",
        "token_threshold": "policies.token_threshold:TokenThreshold",
        "context_share": "policies.context_share:ContextShare",
        "at_shutdown": "policies.at_shutdown:AtShutdown",
        "any_of": "policies.any_of:AnyOf",
        "all_of": "policies.all_of:AllOf",
    }
)
_LONGEST_NAME = 200  # for which the nearest known name is looked up
_DEEPEST = 8  # nesting of combinations


class PolicyError(Exception):
    """A policy that cannot be created; `field` is the one that asks for it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


def build(spec: object, custom: Collection[str] = (), field: str = "policy", depth: int = 0) -> Policy:
    """Create the policy that `spec` describes: `{"use": NAME, parameter: value, ...}`. Raises PolicyError.

    NAME is a built-in's, or one of `custom`, "package.module:Class". A list under `policies` is created first.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("use"), str):
        raise PolicyError(field, f'must be an object with "use": the name of a policy, not {abbreviated(spec)}')
    if depth > _DEEPEST:
        raise PolicyError(field, f"combinations may be nested at most {_DEEPEST} deep")
    parameters = {name: value for name, value in spec.items() if name != "use"}
    inner = parameters.get("policies")
    if isinstance(inner, list | tuple):
        parameters["policies"] = tuple(
            build(one, custom, f"{field}.policies[{i}]", depth + 1) for i, one in enumerate(inner)
        )
    return _create(_load(spec["use"], custom, field), parameters, field)


def _load(name: str, custom: Collection[str], field: str) -> Any:
    known = [*BUILT_IN, *custom]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1) if len(name) <= _LONGEST_NAME else []
        hint = f"did you mean {near[0]!r}?" if near else f"known policies: {', '.join(known)}"
        raise PolicyError(field, f"unknown policy {abbreviated(name)}: {hint}")
    module, colon, attribute = BUILT_IN.get(name, name).partition(":")
    if not (module and colon and attribute):
        raise PolicyError(field, f'{abbreviated(name)} must be "package.module:Class"')
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise PolicyError(field, f"cannot import {module!r}: {type(error).__name__}: {error}") from error
    if not hasattr(imported, attribute):
        raise PolicyError(field, f"module {module!r} has no {attribute!r}")
    return getattr(imported, attribute)


def _create(kind: Any, parameters: Mapping[str, Any], field: str) -> Policy:
    try:
        signature = inspect.signature(kind)
    except (TypeError, ValueError) as error:  # not callable, or without a signature
        raise PolicyError(field, f"these parameters do not fit: {error}") from error
    try:
        signature.bind(**parameters)
    except TypeError as error:
        names = ", ".join(signature.parameters) or "none"
        raise PolicyError(field, f"these parameters do not fit: {error}; it takes {names}") from error
    try:
        policy: Policy = kind(**parameters)
    except (Exception, SystemExit) as error:
        raise PolicyError(field, str(error) or type(error).__name__) from error
    if not callable(getattr(policy, "decide", None)):
        raise PolicyError(field, f"{kind!r:.100} has no method decide(observation)")
    return policy
