"""Every setting of the gateway, once: name, type, default and meaning. A test compares docs/settings.md with it.

Order of precedence: command line, environment (`CWG_` + the name in capitals), TOML file, default. An unknown key stops
the start and names the nearest known one.
"""

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_origin

from pydantic import AfterValidator, BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, InitSettingsSource, SettingsConfigDict
from pydantic_settings import PydanticBaseSettingsSource as Source

from gateway.dialects import prompt_filters
from gateway.validation.addresses import EngineEntries, EngineEntry, EngineUrls, HttpUrl, check, is_url, where
from gateway.validation.fields import json_list
from gateway.validation.shown import shown
from gateway.validation.tier_settings import Bucket, RedisPrefix

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
PREFIX = "CWG_"
# Variables of ours that are not settings of the server: the client side of the CLI.
CLIENT_VARIABLES = frozenset({"CWG_URL", "CWG_SESSION_ID"})
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_FROM_TEXT: Mapping[Any, Callable[[str], Any]] = MappingProxyType(
    {int: int, float: float, bool: lambda t: _WORDS[t.lower()]}
)


class SettingsError(Exception):
    """Settings that cannot be used; the message names each of them, where it came from, and the remedy."""


def _check_filter(name: str) -> str:
    if name not in prompt_filters.RULES:
        near = difflib.get_close_matches(name, prompt_filters.RULES, n=1, cutoff=0)
        raise ValueError(f"has the unknown rule {name!r}; did you mean {near[0]!r}?")
    return name


Secret = Annotated[str, Field(repr=False)]  # hidden in the repr and in errors
Port = Annotated[int, Field(ge=0, le=65535)]
Workers = Annotated[int, Field(ge=1, le=256)]
Count = Annotated[int, Field(gt=0)]
Limit = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
SecondsOrNone = Annotated[float, Field(ge=0)]
RedisUrl = Annotated[Secret, check(lambda url: not url or is_url(url, "redis rediss"), "is not a redis URL")]
StoreUrl = Annotated[
    Secret, check(re.compile(r"sqlite:///|postgres(ql)?://|\Z").match, "is not sqlite:///PATH or postgresql://...")
]
PromptFilter = Annotated[str, AfterValidator(_check_filter)]
ExtraPath = Annotated[
    str, check(re.compile(r"(\*|[A-Z]+) /v1/").match, "{!r} is not a method and a path below /v1/, as in 'POST /v1/x'")
]
Origin = Annotated[
    str, check(re.compile(r"\*|.+?://[^/]+").fullmatch, "{!r} is not an origin, as in 'https://app.example'")
]


def setting(default: Any, text: str) -> Any:
    """Declare one row of the table."""
    return Field(default, description=text)


class Settings(BaseSettings):
    """The settings table."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, strict=True, case_sensitive=True, hide_input_in_errors=True
    )

    host: str = setting("127.0.0.1", "address to listen on; beyond loopback only with `api_key`")
    port: Port = setting(8700, "port to listen on; 0 takes a free one")
    workers: Workers = setting(1, "processes that serve the port, over one store; each has its own connections")
    worker_timeout_s: Seconds = setting(
        30.0, "seconds for which one of several workers may not respond before it is killed and replaced"
    )
    api_key: Secret = setting(
        "", "one key for every API (`Authorization: Bearer` or `x-api-key`); without it no public name is served"
    )
    allowed_origins: tuple[Origin, ...] = setting(
        (), "origins, as `https://app.example`, whose pages may call the gateway and read its answers (CORS); `*`: all"
    )
    extra_paths: tuple[ExtraPath, ...] = setting(
        (), "additional engine paths to pass through: `POST /v1/x`, `GET /v1/y/*`, `* /v1/z`; others are closed"
    )
    engine_urls: EngineUrls = setting(
        ("http://127.0.0.1:8000",), "base URLs of vLLM; a session stays with the engine that has its KV"
    )
    engines: EngineEntries = setting(
        (),
        "tables in place of `engine_urls` and `cache_url`, each an engine with the cache of its node (`url`, "
        "`cache_url`), or a name whose every address is an engine (`discover`, with `cache_port` or `cache_discover`); "
        "in the environment a JSON list",
    )
    engine_api_key: Secret = setting("", "key sent to the engine in place of the client's")
    engine_check_s: Seconds = setting(5.0, "seconds between two checks of an engine's health")
    cache_url: HttpUrl = setting(
        "", "HTTP address of the LMCache server; empty: no cache, windows keep text and ids only"
    )
    kv_dir: str = setting("", "directory of LMCache's `fs` tier, as this machine sees it; empty: no disk tier")
    kv_redis_url: RedisUrl = setting("", "Redis or Valkey of LMCache's Redis tier; empty: no Redis tier")
    kv_redis_adapter: Literal["resp", "valkey"] = setting("resp", "the adapter that LMCache uses for it")
    kv_redis_prefix: RedisPrefix = setting("", "`key_prefix` of the `valkey` adapter")
    kv_redis_cluster: bool = setting(False, "whether it is a cluster (`cluster_mode` of the `valkey` adapter)")
    s3_bucket: Bucket = setting("", "bucket of LMCache's `s3` tier; empty: no S3 tier")
    s3_pins_bucket: Bucket = setting("", "another bucket, for the gateway's pins; nothing in it may expire")
    s3_endpoint: HttpUrl = setting("", "base URL of a server that speaks S3; empty: Amazon's")
    s3_region: str = setting("us-east-1", "region of both buckets")
    s3_path_style: bool = setting(False, "whether the gateway has the bucket in the path of a URL, not in its host")
    s3_access_key_id: str = setting("", "key for both buckets; empty: AWS's chain (environment, profile, role)")
    s3_secret_access_key: Secret = setting("", "its secret")
    pins_dir: str = setting("", "where pinned objects are linked; same file system as `kv_dir`; empty: `<kv_dir>-pins`")
    chunk_size: Limit = setting(0, "tokens per chunk; 0 asks the cache")
    data_dir: str = setting("data", "the gateway's own data directory")
    store_url: StoreUrl = setting(
        "",
        "the gateway's store: `sqlite:///PATH` or `postgresql://USER:PASSWORD@HOST/DATABASE`; "
        "empty: `sqlite:///<data_dir>/gateway.db`",
    )
    store_statement_cache: Limit = setting(
        200, "prepared statements of each connection to PostgreSQL; 0 behind a pooler that does not keep them"
    )
    secret_file: str = setting("", "secret of the salts, created on first use; empty: `<data_dir>/secret`")
    accept_new_secret: bool = setting(
        False, "start with a secret other than the store's, once: KV stored under the old one is not found again"
    )
    isolation: Literal["session", "tenant"] = setting(
        "session", "`session`: a salt for each lineage; `tenant`: one for all of a tenant"
    )
    identify: Literal["prefix", "by_id"] = setting(
        "prefix",
        "how a request without an id is matched: `prefix`: by its conversation; `by_id`: it begins a new session",
    )
    model_fingerprint: str = setting("", "distinguishes the served weights from others of the same name")
    normalise: tuple[PromptFilter, ...] = setting(
        prompt_filters.RULES, "rules that remove volatile lines from the front of the prompt; empty: none"
    )
    tokenizer_file: str = setting(
        "", "the served model's tokenizer.json; empty: searched in its directory and in Hugging Face's cache"
    )
    connect_timeout_s: Seconds = setting(5.0, "seconds to connect to the engine, the cache or Redis")
    engine_timeout_s: Seconds = setting(600.0, "seconds the engine may be silent, before its first byte or between two")
    abort_grace_s: SecondsOrNone = setting(
        10.0, "seconds to wait for the first output after a disconnect, on an engine that an abort might crash; 0: none"
    )
    client_timeout_s: Seconds = setting(
        30.0, "seconds a client may take for its headers, between two parts of a body, and to read some of its response"
    )
    max_connections: Count = setting(
        10_000,
        "clients at once; at the limit an idle connection is closed for a new client; if none is idle, the client gets "
        "a 503 (probes are still answered)",
    )
    max_body_bytes: Count = setting(64 * 2**20, "largest request body")
    max_json_values: Count = setting(
        1_100_000, "maximum number of members of all arrays and objects of a JSON body together"
    )
    max_messages: Count = setting(10_000, "maximum number of messages, or input items, in a request")
    body_timeout_s: Seconds = setting(
        120.0, "seconds that a whole body may take, and one more for each 64 KiB received"
    )
    max_import_bytes: Count = setting(64 * 2**30, "largest window file that can be imported; it is read as a stream")
    max_reply_bytes: Count = setting(
        64 * 2**20, "largest reply that is kept for the transcript; a larger one passes through only"
    )
    turn_queue: Count = setting(
        4096, "finished turns that may wait for the store; past it new turns are `rate_limited`"
    )
    turns_kept: Count = setting(200, "turns remembered per session; the transcript is kept complete")
    sessions_kept: Count = setting(100_000, "sessions remembered; beyond that the longest idle ones are deleted")
    expiry_grace_s: SecondsOrNone = setting(60.0, "seconds for which the text of an expired window can still be read")
    session_ttl_s: SecondsOrNone = setting(
        0.0, "seconds after which an idle session is `expired`, and the next sweep deletes it with its KV; 0: never"
    )
    disk_budget_bytes: Limit = setting(
        0, "bytes for the disk tier; past it, KV of the longest idle sessions is deleted first; 0: no limit"
    )
    redis_budget_bytes: Limit = setting(0, "the same for the Redis tier")
    tenant_budget_bytes: Limit = setting(
        0, "bytes that a tenant's windows may hold, all tiers together; a freeze past it is `storage_full`; 0: no limit"
    )
    disk_reserve_bytes: Count = setting(
        256 * 2**20,
        "free bytes on the disk tier below which a freeze is `storage_full`, and an import in `data_dir`; a sweep then "
        "deletes KV of idle sessions",
    )
    gateway_lease_s: Seconds = setting(
        10.0, "seconds without a sign of life after which the other gateways on the store take one for ended"
    )
    sweep_every_s: Seconds = setting(60.0, "seconds between two sweeps for what has expired or is no longer needed")
    clock_hold_s: Seconds = setting(
        3600.0, "seconds for which nothing expires after the clock has jumped, or after a long time without a gateway"
    )
    responses_kept: Count = setting(
        10_000, "responses of `/v1/responses` stored for each tenant; the oldest are deleted first"
    )
    busy_wait_s: Seconds = setting(5.0, "seconds a freeze waits for a turn in flight before `session_busy`")
    on_full: Literal["error", "successor"] = setting(
        "error",
        "when a prompt exceeds the context limit: `error`; `successor`: freeze, and continue in another session",
    )
    freeze_timeout_s: Seconds = setting(60.0, "seconds a freeze waits for the cache's objects to appear in a tier")
    thaw_timeout_s: Seconds = setting(120.0, "seconds a thaw waits for a prefetch")
    auto_freeze: bool = setting(True, "whether sessions are frozen automatically (Automatic windows)")
    auto_freeze_idle_minutes: float = setting(15.0, "freeze a session without a turn for this long; 0: off")
    auto_freeze_tokens: int = setting(0, "freeze a session that passes this many tokens; 0: off")
    auto_freeze_share: float = setting(0.9, "freeze a session that passes this share of the context limit; 0: off")
    auto_freeze_at_shutdown: bool = setting(False, "whether unfrozen sessions are frozen at shutdown")
    auto_freeze_policies: tuple[str, ...] = setting(
        (), "custom policies, `package.module:Class`; all are used unless set otherwise at run time"
    )
    auto_freeze_name: str = setting(
        "auto-{session_id}-{timestamp}", "names of automatic windows; may also contain `{turns}`"
    )
    auto_freeze_tags: tuple[str, ...] = setting(("auto",), "tags of automatic windows; `auto` is always among them")
    auto_freeze_cooldown_s: Seconds = setting(60.0, "seconds between two automatic freezes of a session")
    auto_freeze_keep: int = setting(3, "automatic windows kept of each session; older ones are deleted")
    auto_freeze_ttl_days: float = setting(30.0, "days until an automatic window expires; 0: never")
    auto_freeze_every_s: Seconds = setting(5.0, "seconds between two checks for idle sessions")
    shutdown_grace_s: SecondsOrNone = setting(
        10.0, "seconds that requests in progress may take to end at shutdown; what is left is closed and recorded"
    )
    shutdown_freeze_s: Seconds = setting(8.0, "seconds that freezing at shutdown may take; what is left is not frozen")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "`debug`, `info`, `warning` or `error`")
    log_format: Literal["text", "json"] = setting("text", "`text`, or `json`: an object a line, with request and trace")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: Source, *_: Source, **__: Source
    ) -> tuple[Source, ...]:
        """Only what a constructor is given: `load` reads the file and the environment."""
        return (init_settings,)

    @field_validator("*", mode="before")
    @classmethod
    def _parse(cls, value: Any, info: ValidationInfo) -> Any:
        """Convert text, which is all that the environment has; pydantic refuses what cannot be converted."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if info.field_name == "engines" and isinstance(value, str):
            value = json_list(value)
        if get_origin(kind) is tuple:
            if isinstance(value, str):
                value = value.split(",") if value.strip() else []
            is_list = isinstance(value, list)
            return tuple(part.strip() if isinstance(part, str) else part for part in value) if is_list else value
        if isinstance(value, str) and kind in _FROM_TEXT:
            with suppress(KeyError, ValueError):
                return _FROM_TEXT[kind](value)
        return value

    @field_validator("log_level", "log_format", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _require_key_beyond_loopback(self) -> "Settings":
        if self.host not in LOOPBACK and not self.api_key:
            raise ValueError(f"host {self.host!r} is reachable from other machines: set api_key (CWG_API_KEY)")
        return self

    @model_validator(mode="after")
    def _require_key_for_all_pages(self) -> "Settings":
        if "*" in self.allowed_origins and not self.api_key:
            raise ValueError("allowed_origins '*' lets every web page read conversations: name origins, or set api_key")
        return self

    @model_validator(mode="after")
    def _refuse_two_forms(self) -> "Settings":
        """Short and long form exclude each other: which of two addresses was meant could only be guessed."""
        both = [name for name in ("engine_urls", "cache_url") if self.engines and name in self.model_fields_set]
        if both:
            raise ValueError(
                f"engines and {' and '.join(both)} exclude each other: give each engine as `[[engines]]` with its url "
                "and cache_url, and take the other setting out"
            )
        return self

    @property
    def nodes(self) -> tuple[EngineEntry, ...]:
        """Every engine with its cache, from `engines` or from `engine_urls` and `cache_url`."""
        return self.engines or tuple(EngineEntry(url=url, cache_url=self.cache_url) for url in self.engine_urls)

    @property
    def has_cache(self) -> bool:
        """Whether any engine has a cache."""
        return any(node.has_cache for node in self.nodes)

    @property
    def data_path(self) -> Path:
        """`data_dir` as an absolute path."""
        return _absolute(self.data_dir)

    @property
    def store_path(self) -> Path | None:
        """File of the store; None if it is on PostgreSQL."""
        if self.store_url.startswith("postgres"):
            return None
        return _absolute(self.store_url.removeprefix("sqlite:///") or f"{self.data_dir}/gateway.db")

    @property
    def secret_path(self) -> Path:
        """File of the secret."""
        return _absolute(self.secret_file or f"{self.data_dir}/secret")

    @property
    def tokenizer_path(self) -> Path | None:
        """File of the tokenizer, if it is set."""
        return _absolute(self.tokenizer_file) if self.tokenizer_file else None

    @property
    def kv_path(self) -> Path | None:
        """Directory of the disk tier."""
        return _absolute(self.kv_dir) if self.kv_dir else None

    @property
    def pins_path(self) -> Path | None:
        """Directory of the pins on disk."""
        if self.pins_dir:
            return _absolute(self.pins_dir)
        return self.kv_path.with_name(f"{self.kv_path.name}-pins") if self.kv_path else None


def _absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()


def load(
    *, file: Path | None = None, environment: Mapping[str, str], overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Read the settings. Raises `SettingsError` for an unknown key or a value that does not fit.

    The sources are filled here: pydantic-settings' own ignore a file that is missing or a pipe, and unknown variables.
    """
    options = {name: value for name, value in (overrides or {}).items() if value is not None}
    variables = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(PREFIX) and name not in CLIENT_VARIABLES
    }
    table = _read(file) if file else {}
    in_file = dict.fromkeys(table, str(file))
    in_environment = {name: f"environment variable {PREFIX}{name.upper()}" for name in variables}
    on_command_line = {name: f"option --{name.replace('_', '-')}" for name in options}
    try:
        settings = _build(options, variables, table)
    except ValidationError as error:
        origins = in_file | in_environment | on_command_line
        raise SettingsError(_explain(error.errors(), origins)) from error
    _check_overridden({name: value for name, value in variables.items() if name in options}, in_environment)
    _check_overridden({name: value for name, value in table.items() if name in {*variables, *options}}, in_file)
    return settings


def _build(*values: dict[str, Any]) -> Settings:
    sources = tuple(InitSettingsSource(Settings, some) for some in values)
    return Settings(_build_sources=(sources, {}))  # type: ignore[call-arg] # mypy sees the fields only


def _check_overridden(values: dict[str, Any], origins: Mapping[str, str]) -> None:
    """Refuse a wrong value that another source overrides: it would stop the start once the other is gone."""
    try:
        _build(values)
    except ValidationError as error:
        if wrong := [e for e in error.errors() if e["loc"]]:  # the rest is about several settings at once
            raise SettingsError(_explain(wrong, origins)) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise SettingsError(f"cannot read {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is not TOML: {error}") from error


def _explain(errors: Iterable[ErrorDetails], origins: Mapping[str, str]) -> str:
    return "; ".join(_explain_one(error, origins) for error in errors)


def _explain_one(error: ErrorDetails, origins: Mapping[str, str]) -> str:
    if not error["loc"]:  # about several settings
        return str(error["ctx"]["error"])
    setting_name, *inner = error["loc"]
    name, origin = str(setting_name), f"{origins[str(setting_name)]}: " if str(setting_name) in origins else ""
    place = name + (where(inner) if name == "engines" else "")
    if error["type"] == "extra_forbidden":
        return origin + _unknown(str(error["loc"][-1]), place, EngineEntry if inner else Settings)
    if error["type"] == "value_error":
        return f"{origin}{place} {error['ctx']['error']}"
    must = error["msg"].replace("Input should", "must").replace("tuple", "list of strings")
    must = must.replace("dictionary or instance of EngineEntry", "table, with url and cache_url")
    value = f", not {shown(error['input'])}" if Settings.model_fields[name].repr else ""
    return f"{origin}{place} {must}{value}"


def _unknown(key: str, place: str, model: type[BaseModel]) -> str:
    near = difflib.get_close_matches(key, model.model_fields, n=1)
    return f"unknown setting {place!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def table() -> list[tuple[str, str, str]]:
    """Return (name, default, help) of every setting, in order."""
    return [
        (name, ",".join(f.default) if isinstance(f.default, tuple) else str(f.default), f.description or "")
        for name, f in Settings.model_fields.items()
    ]
