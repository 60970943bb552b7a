"""Every setting of the gateway, once: name, default and meaning. A test compares docs/settings.md with it.

Order of precedence: command line, environment (`CWG_` + the name in capitals), TOML file, default. An unknown key stops
the start and names the nearest right one.
"""

import difflib
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from gateway.dialects import prompt_filters

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
PREFIX = "CWG_"
# Variables of ours that are not settings of the server: the client side of the CLI.
CLIENT_VARIABLES = frozenset({"CWG_URL"})
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
_NONE_IS_0 = frozenset(
    {
        "abort_grace_s",
        "disk_budget_bytes",
        "expiry_grace_s",
        "redis_budget_bytes",
        "session_ttl_s",
        "tenant_budget_bytes",
    }
)


class SettingsError(Exception):
    """A setting that cannot be used; the message names it and the remedy."""


def setting(default: Any, text: str) -> Any:
    """Declare one row of the table."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings table."""

    host: str = setting("127.0.0.1", "address to listen on; beyond loopback only with `api_key`")
    port: int = setting(8700, "port to listen on; 0 takes a free one")
    workers: int = setting(1, "processes that serve the port, over one store; each has its own connections")
    worker_timeout_s: float = setting(
        30.0, "seconds for which one of several workers may not respond before it is killed and replaced"
    )
    api_key: str = setting(
        "",
        "one key for every API (`Authorization: Bearer` or `x-api-key`); without it no public name is served",
    )
    allowed_origins: tuple[str, ...] = setting(
        (), "origins, as `https://app.example`, whose pages may call the gateway; `*`: all. No CORS headers are sent"
    )
    extra_paths: tuple[str, ...] = setting(
        (), "additional engine paths to pass through: `POST /v1/x`, `GET /v1/y/*`, `* /v1/z`; others are closed"
    )
    engine_urls: tuple[str, ...] = setting(
        ("http://127.0.0.1:8000",), "base URLs of vLLM; a session stays with the engine that has its KV"
    )
    engine_api_key: str = setting("", "key sent to the engine in place of the client's")
    engine_check_s: float = setting(5.0, "seconds between two checks of an engine's health")
    cache_url: str = setting("", "HTTP address of the LMCache server; empty: no cache, windows keep text and ids only")
    kv_dir: str = setting("", "directory of LMCache's `fs` tier, as this machine sees it; empty: no disk tier")
    kv_redis_url: str = setting("", "Redis of LMCache's `resp` tier; empty: no Redis tier")
    pins_dir: str = setting("", "where pinned objects are linked; same file system as `kv_dir`; empty: `<kv_dir>-pins`")
    chunk_size: int = setting(0, "tokens per chunk; 0 asks the cache")
    data_dir: str = setting("data", "the gateway's own data directory")
    store_url: str = setting("", "the gateway's store; empty: `sqlite:///<data_dir>/gateway.db`")
    secret_file: str = setting("", "secret of the salts, created on first use; empty: `<data_dir>/secret`")
    accept_new_secret: bool = setting(
        False,
        "start with a secret other than the store's, once: KV stored under the old one is not found again",
    )
    isolation: str = setting("session", "`session`: a salt for each lineage; `tenant`: one for all of a tenant")
    identify: str = setting(
        "prefix",
        "how a request without an id is matched: `prefix`: by its conversation; `by_id`: it begins a new session",
    )
    model_fingerprint: str = setting("", "distinguishes the served weights from others of the same name")
    normalise: tuple[str, ...] = setting(
        prompt_filters.RULES, "rules that remove volatile lines from the front of the prompt; empty: none"
    )
    tokenizer_file: str = setting(
        "", "the served model's tokenizer.json; empty: searched in its directory and in Hugging Face's cache"
    )
    connect_timeout_s: float = setting(5.0, "seconds to connect to the engine, the cache or Redis")
    engine_timeout_s: float = setting(600.0, "seconds the engine may be silent, before its first byte or between two")
    abort_grace_s: float = setting(
        10.0,
        "seconds that an engine which an abort may crash has to begin its reply after a disconnect; 0: none",
    )
    client_timeout_s: float = setting(
        30.0, "seconds a client may take for its headers, between two parts of a body, and to read some of its response"
    )
    max_connections: int = setting(
        10_000,
        "clients at once; for one more an idle connection is closed, or else it is refused (503) unless it is a probe "
        "(`/healthz`, `/readyz`)",
    )
    max_body_bytes: int = setting(64 * 2**20, "largest request body")
    max_json_values: int = setting(
        1_100_000, "maximum number of members of all arrays and objects of a JSON body together"
    )
    max_messages: int = setting(10_000, "maximum number of messages, or input items, in a request")
    body_timeout_s: float = setting(120.0, "seconds that a whole body may take, and one more for each 64 KiB received")
    max_import_bytes: int = setting(64 * 2**30, "largest window file that can be imported; it is read as a stream")
    max_reply_bytes: int = setting(
        64 * 2**20, "largest reply that is kept for the transcript; a larger one passes through only"
    )
    turn_queue: int = setting(4096, "finished turns that may wait for the store; past it new turns are `rate_limited`")
    turns_kept: int = setting(200, "turns remembered per session; the transcript is kept complete")
    sessions_kept: int = setting(100_000, "sessions remembered; beyond that the longest idle ones are deleted")
    expiry_grace_s: float = setting(60.0, "seconds for which the text of an expired window can still be read")
    session_ttl_s: float = setting(
        0.0, "seconds after which an idle session is `expired`, and the next sweep deletes it with its KV; 0: never"
    )
    disk_budget_bytes: int = setting(
        0, "bytes for the disk tier; past it, KV of the longest idle sessions is deleted first; 0: no limit"
    )
    redis_budget_bytes: int = setting(0, "the same for the Redis tier")
    tenant_budget_bytes: int = setting(
        0, "bytes that a tenant's windows may hold, all tiers together; a freeze past it is `storage_full`; 0: no limit"
    )
    disk_reserve_bytes: int = setting(
        256 * 2**20,
        "free bytes on the disk tier below which a freeze is `storage_full`, and an import in `data_dir`; a sweep then "
        "deletes KV of idle sessions",
    )
    sweep_every_s: float = setting(60.0, "seconds between two sweeps for what has expired and what is no longer needed")
    clock_hold_s: float = setting(
        3600.0, "seconds for which nothing expires after the clock has jumped, or after a long time without a gateway"
    )
    responses_kept: int = setting(
        10_000, "responses of `/v1/responses` stored for each tenant; the oldest are deleted first"
    )
    busy_wait_s: float = setting(5.0, "seconds a freeze waits for a turn in flight before `session_busy`")
    on_full: str = setting(
        "error",
        "when a prompt exceeds the context limit: `error`; `successor`: freeze, and continue in another session",
    )
    freeze_timeout_s: float = setting(60.0, "seconds a freeze waits for the cache's objects to appear in a tier")
    thaw_timeout_s: float = setting(120.0, "seconds a thaw waits for a prefetch")
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
    auto_freeze_cooldown_s: float = setting(60.0, "seconds between two automatic freezes of a session")
    auto_freeze_keep: int = setting(3, "automatic windows kept of each session; older ones are deleted")
    auto_freeze_ttl_days: float = setting(30.0, "days until an automatic window expires; 0: never")
    auto_freeze_every_s: float = setting(5.0, "seconds between two checks for idle sessions")
    shutdown_freeze_s: float = setting(8.0, "seconds that freezing at shutdown may take; what is left is not frozen")
    log_level: str = setting("info", "`debug`, `info`, `warning` or `error`")

    def __post_init__(self) -> None:
        _check(self)

    @property
    def data_path(self) -> Path:
        """`data_dir` as an absolute path."""
        return Path(self.data_dir).expanduser().absolute()

    @property
    def store_path(self) -> Path:
        """File of the SQLite store."""
        if not self.store_url:
            return self.data_path / "gateway.db"
        return Path(self.store_url.removeprefix("sqlite:///")).expanduser().absolute()

    @property
    def secret_path(self) -> Path:
        """File of the secret."""
        return Path(self.secret_file).expanduser().absolute() if self.secret_file else self.data_path / "secret"

    @property
    def tokenizer_path(self) -> Path | None:
        """File of the tokenizer, where one is named."""
        return Path(self.tokenizer_file).expanduser().absolute() if self.tokenizer_file else None

    @property
    def kv_path(self) -> Path | None:
        """Directory of the disk tier."""
        return Path(self.kv_dir).expanduser().absolute() if self.kv_dir else None

    @property
    def pins_path(self) -> Path | None:
        """Directory of the pins on disk."""
        if self.pins_dir:
            return Path(self.pins_dir).expanduser().absolute()
        return self.kv_path.with_name(f"{self.kv_path.name}-pins") if self.kv_path else None


def load(
    *, file: Path | None = None, environment: Mapping[str, str], overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Read the settings. Raises `SettingsError` for an unknown key or a value that does not fit."""
    values: dict[str, Any] = {}
    if file is not None:
        values |= _from_file(file)
    values |= _from_environment(environment)
    values |= {k: v for k, v in (overrides or {}).items() if v is not None}
    return Settings(**values)


def _from_file(file: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text())
    except OSError as error:
        raise SettingsError(f"cannot read {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is not TOML: {error}") from error
    return {name: _convert(name, value, str(file)) for name, value in table.items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    ours = {k: v for k, v in environment.items() if k.startswith(PREFIX) and k not in CLIENT_VARIABLES}
    return {
        name: _convert(name, value, f"environment variable {PREFIX}{name.upper()}")
        for name, value in ((k.removeprefix(PREFIX).lower(), v) for k, v in ours.items())
    }


def _convert(name: str, value: Any, where: str) -> Any:
    kind = get_type_hints(Settings).get(name)
    if kind is None:
        near = difflib.get_close_matches(name, [f.name for f in fields(Settings)], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SettingsError(f"{where}: unknown setting {name!r}{hint}")
    try:
        return _as(kind, value)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{where}: setting {name!r} must be {_name_of(kind)}, not {value!r}") from error


def _as(kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple:
        if isinstance(value, str):
            value = value.split(",") if value.strip() else ()
        return tuple(str(p).strip() for p in value)
    if kind is bool and isinstance(value, str):
        if value.lower() in _TRUE | _FALSE:
            return value.lower() in _TRUE
        raise ValueError(value)
    if kind is bool and not isinstance(value, bool):
        raise TypeError(value)
    if kind in (int, float) and isinstance(value, bool):
        raise TypeError(value)
    if kind is int and isinstance(value, float):
        raise TypeError(value)
    if kind is str and not isinstance(value, str):
        raise TypeError(value)
    return kind(value)


def _name_of(kind: Any) -> str:
    return (
        "a list of strings"
        if get_args(kind)
        else {"int": "a whole number", "str": "a string", "bool": "true or false"}.get(kind.__name__, "a number")
    )


def _check(s: Settings) -> None:
    _require(
        s.host in LOOPBACK or bool(s.api_key), f"host {s.host!r} is beyond loopback: set api_key (CWG_API_KEY) first"
    )
    _require(0 <= s.port <= 65535, f"port {s.port} is not between 0 and 65535")
    _require(bool(s.engine_urls), "engine_urls is empty; give the base URL of each engine")
    for name, url in [*(("engine_urls", url) for url in s.engine_urls), ("cache_url", s.cache_url)]:
        empty = not url and name == "cache_url"
        # Addresses are shown in errors, health, turns and logs.
        _require(
            "@" not in url.partition("://")[2].partition("/")[0],
            f"{name} has a user name or password in a URL; take it out (a key for the engine is engine_api_key)",
        )
        _require(empty or _is_url(url, ("http", "https")), f"{name} {url!r} is not an http(s) URL")
    twice = [url for url, times in Counter(map(_bare, s.engine_urls)).items() if times > 1]
    _require(not twice, f"engine_urls has {', '.join(twice)} more than once; give each engine once")
    _require(
        not s.kv_redis_url or _is_url(s.kv_redis_url, ("redis", "rediss")),
        f"kv_redis_url {s.kv_redis_url!r} is not a redis URL",
    )
    _require(
        not s.store_url or s.store_url.startswith("sqlite:///"), f"store_url {s.store_url!r} must be sqlite:///PATH"
    )
    _require(s.isolation in ("session", "tenant"), f"isolation {s.isolation!r} is neither 'session' nor 'tenant'")
    _require(s.identify in ("prefix", "by_id"), f"identify {s.identify!r} is neither 'prefix' nor 'by_id'")
    _require(s.on_full in ("error", "successor"), f"on_full {s.on_full!r} is neither 'error' nor 'successor'")
    _require(
        s.log_level in ("debug", "info", "warning", "error"),
        f"log_level {s.log_level!r} is not one of debug, info, warning, error",
    )
    _require(1 <= s.workers <= 256, f"workers {s.workers} is not between 1 and 256")
    for name in s.normalise:
        near = difflib.get_close_matches(name, prompt_filters.RULES, n=1, cutoff=0)
        _require(name in prompt_filters.RULES, f"normalise: unknown rule {name!r}; did you mean {near[0]!r}?")
    for one in s.extra_paths:
        method, _, path = one.partition(" ")
        shaped = path.startswith("/v1/") and (method == "*" or (method.isalpha() and method.isupper()))
        _require(shaped, f"extra_paths: {one!r} is not a method and a path below /v1/, as in 'POST /v1/x'")
    for one in s.allowed_origins:
        _require(
            one == "*" or _is_origin(one), f"allowed_origins: {one!r} is not an origin, as in 'https://app.example'"
        )
    _require(s.chunk_size >= 0, f"chunk_size {s.chunk_size} is negative")
    for f in fields(s):
        value = getattr(s, f.name)
        counts = ("turn_queue", "max_connections", "max_messages", "max_json_values")
        if f.name.endswith(("_s", "_bytes", "_kept")) or f.name in counts:
            fits = value > 0 or (value == 0 and f.name in _NONE_IS_0)
            _require(fits, f"{f.name} must be more than 0, not {value}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SettingsError(message)


def _bare(url: str) -> str:
    """A URL without what makes no difference."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.lower(), path=parts.path.rstrip("/")).geturl()


def _is_origin(text: str) -> bool:
    scheme, separator, host = text.partition("://")
    return bool(scheme and separator and host) and "/" not in host


def _is_url(url: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def table() -> list[tuple[str, str, str]]:
    """Return (name, default, help) of every setting, in order."""

    def default(f: "Field[Any]") -> str:
        return ",".join(f.default) if isinstance(f.default, tuple) else str(f.default)

    return [(f.name, default(f), f.metadata["help"]) for f in fields(Settings)]
