"""The rules of automatic freezing: their values and bounds, and the names of the windows."""

import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Annotated, Any, get_type_hints

from gateway.errors import GatewayError
from gateway.records import AUTO_TAG, MAX_DESCRIPTION, MAX_NAME, MAX_TAGS, WINDOW_NAME
from gateway.settings import Settings, SettingsError
from gateway.validation import fields
from gateway.validation.fields import Field, or_null, reads
from policies.contract import Policy
from policies.idle_timeout import MOST_MINUTES
from policies.loader import PolicyError, build
from policies.token_threshold import MOST_TOKENS

_DAY = 86400.0
_SUFFIX = 4  # room for "-999", where a name is taken
LONGEST_PATTERN = 80
_NAMES = ("session_id", "timestamp", "turns", "count")  # `count`: the replaced system's name of `turns`
MAX_POLICIES = 32
MAX_KEPT = 100
MAX_COOLDOWN_S = 7 * _DAY
MOST_TTL_S = 1e9
_SPEC = {"type": "object", "properties": {"use": {"type": "string"}}, "required": ["use"]}


@reads(
    {
        "type": "string",
        "maxLength": LONGEST_PATTERN,
        "description": "names of the windows, with {session_id} and {timestamp}, and {turns} if you like",
    }
)
def _pattern(name: str, value: object) -> str:
    pattern = fields.text(LONGEST_PATTERN).read(name, value)
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise fields.invalid(name, f"a pattern with balanced braces ({error})", value) from error
    used = [field for _, field, _, _ in parts if field is not None]
    if any(field not in _NAMES or spec or how for _, field, spec, how in parts if field is not None):
        raise fields.invalid(name, "a pattern with no other fields than {session_id}, {timestamp} and {turns}", value)
    if used.count("session_id") != 1 or used.count("timestamp") != 1:
        raise fields.invalid(name, "a pattern with {session_id} and {timestamp}, each once: names must differ", value)
    if not WINDOW_NAME.fullmatch(window_name(pattern, "s", 1, 0.0)):
        raise fields.invalid(
            name, "a pattern that makes window names: a letter or digit, then A-Z a-z 0-9 _ . -", value
        )
    return pattern


@reads(
    {
        "type": "array",
        "items": _SPEC,
        "maxItems": MAX_POLICIES,
        "description": 'further policies, such as {"use": "token_threshold", "tokens": 8000}',
    }
)
def _specs(name: str, value: object) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_POLICIES:
        raise fields.invalid(name, f"a list of at most {MAX_POLICIES} policies", value)
    return tuple(value)


@reads({**fields.tags.schema, "description": f"tags of the windows; `{AUTO_TAG}` is always among them"})
def _tags(name: str, value: object) -> tuple[str, ...]:
    """Tags, with the one by which `keep` knows automatic windows."""
    given = fields.tags.read(name, [*value] if isinstance(value, tuple) else value)
    tags = tuple(dict.fromkeys((*given, AUTO_TAG)))
    if len(tags) > MAX_TAGS:
        raise fields.invalid(name, f"a list of at most {MAX_TAGS} tags, {AUTO_TAG!r} among them", value)
    return tags


@dataclass(frozen=True, slots=True)
class Rules:
    """When sessions are frozen automatically, and how their windows are named and kept. None: that rule is off."""

    enabled: Annotated[bool, fields.boolean.about("whether sessions are frozen automatically")] = True
    idle_timeout_minutes: Annotated[
        float | None, or_null(fields.number(MOST_MINUTES)).about("freeze after this idle time; null: off")
    ] = 15.0
    token_threshold: Annotated[
        int | None, or_null(fields.whole(1, MOST_TOKENS)).about("freeze at this many tokens; null: off")
    ] = None
    context_share: Annotated[
        float | None, or_null(fields.number(1)).about("freeze at this share of the context limit; null: off")
    ] = 0.9
    at_shutdown: Annotated[bool, fields.boolean.about("freeze every session when the gateway stops")] = False
    policies: Annotated[tuple[Mapping[str, Any], ...], _specs] = ()
    naming_pattern: Annotated[str, _pattern] = "auto-{session_id}-{timestamp}"
    tags: Annotated[tuple[str, ...], _tags] = (AUTO_TAG,)
    cooldown_seconds: Annotated[
        float, fields.number(MAX_COOLDOWN_S).about("least time between two windows of a session")
    ] = 60.0
    keep: Annotated[int, fields.whole(1, MAX_KEPT).about("how many automatic windows of a session are kept")] = 3
    ttl_seconds: Annotated[
        float | None, or_null(fields.number(MOST_TTL_S)).about("how long an automatic window is kept; null: for ever")
    ] = 30 * _DAY

    def specs(self) -> list[tuple[str, Mapping[str, Any]]]:
        """The specs of all policies that are on, each with the field that asks for it."""
        built_in: dict[str, Mapping[str, Any]] = {
            "idle_timeout_minutes": {"use": "idle_timeout", "minutes": self.idle_timeout_minutes},
            "token_threshold": {"use": "token_threshold", "tokens": self.token_threshold},
            "context_share": {"use": "context_share", "share": self.context_share},
            "at_shutdown": {"use": "at_shutdown"},
        }
        on = [(field, spec) for field, spec in built_in.items() if getattr(self, field)]
        return [*on, *((f"policies[{i}]", spec) for i, spec in enumerate(self.policies))]


READERS: Mapping[str, Field[Any]] = MappingProxyType(
    {name: hint.__metadata__[0] for name, hint in get_type_hints(Rules, include_extras=True).items()}
)
_SETTINGS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    # rule: the setting, and the conversion of its value
    "enabled": ("auto_freeze", bool),
    "idle_timeout_minutes": ("auto_freeze_idle_minutes", lambda minutes: minutes or None),
    "token_threshold": ("auto_freeze_tokens", lambda tokens: tokens or None),
    "context_share": ("auto_freeze_share", lambda share: share or None),
    "at_shutdown": ("auto_freeze_at_shutdown", bool),
    "naming_pattern": ("auto_freeze_name", str),
    "tags": ("auto_freeze_tags", list),
    "cooldown_seconds": ("auto_freeze_cooldown_s", float),
    "keep": ("auto_freeze_keep", int),
    "ttl_seconds": ("auto_freeze_ttl_days", lambda days: days * _DAY or None),
}


def from_settings(settings: Settings) -> Rules:
    """Return the rules that the settings ask for. Raises SettingsError."""
    values: dict[str, Any] = {}
    try:
        for rule, (setting, convert) in _SETTINGS.items():
            values[rule] = READERS[rule](setting, convert(getattr(settings, setting)))
    except GatewayError as error:
        raise SettingsError(error.message) from error
    return Rules(policies=tuple({"use": name} for name in settings.auto_freeze_policies), **values)


def as_json(rules: Rules) -> dict[str, Any]:
    """The rules as the admin API shows them."""
    return {**asdict(rules), "policies": list(rules.policies), "tags": list(rules.tags)}


def with_changes(rules: Rules, changes: Mapping[str, Any]) -> Rules:
    """Return `rules` with the fields in `changes`. Raises `invalid_request`, naming the field."""
    return replace(rules, **{name: READERS[name](name, value) for name, value in changes.items()})


def build_policies(rules: Rules, custom: Collection[str]) -> list[tuple[str, Policy]]:
    """Create every policy that is on. Raises `invalid_request`, naming the field."""
    try:
        return [(field, build(spec, custom, field)) for field, spec in rules.specs()]
    except PolicyError as error:
        hint = 'a custom policy must be listed in the setting "auto_freeze_policies"'
        raise GatewayError("invalid_request", str(error), hint=hint, details={"field": error.field}) from error


def check_limits(rules: Rules, limits: Mapping[str, int]) -> None:
    """Raise `invalid_request` for a threshold above the context limit of every model that is served."""
    most = max(limits.values(), default=0)
    for field, tokens in _thresholds(rules.specs()):
        if most and tokens > most:
            message = f"{field} {tokens} is above the context limit of every model served: at most {most}"
            raise GatewayError("invalid_request", message, hint="set it lower", details={"field": field})


def _thresholds(specs: list[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, int]]:
    thresholds = []
    for field, spec in specs:
        if spec["use"] == "token_threshold":
            thresholds.append((field, spec["tokens"]))
        inner = spec.get("policies")
        if isinstance(inner, list | tuple):  # a combination; a custom policy may have another type here
            thresholds += _thresholds([(f"{field}.policies[{i}]", one) for i, one in enumerate(inner)])
    return thresholds


def window_name(pattern: str, session_id: str, turns: int, at: float) -> str:
    """Return a window's name from `pattern`, short enough for a suffix."""
    stamp = datetime.fromtimestamp(at, UTC).strftime("%Y%m%d-%H%M%S")
    plain = session_id.replace(":", "-")
    values = {"timestamp": stamp, "turns": str(turns), "count": str(turns), "session_id": ""}
    parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(pattern)]
    rest = sum(len(literal) + len(values[name or "session_id"]) for literal, name in parts)
    values["session_id"] = plain[: MAX_NAME - _SUFFIX - rest]
    return "".join(literal + (values[name] if name else "") for literal, name in parts)


def description(reason: str) -> str:
    """Return the description of an automatic window."""
    return f"Frozen automatically: {reason}"[:MAX_DESCRIPTION].replace("\0", "")
