"""Addresses in the settings: URLs, names that are looked up, and the pairs of engine and cache made of them."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

_HOST_AND_PORT = re.compile(r"(?!.*://)(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_MAX_PORT = 65535


def check(fits: Callable[[str], object], problem: str) -> AfterValidator:
    """Make a validator that refuses texts that do not fit, with `problem`, which may show the text as `{}`."""

    def refuse(value: str) -> str:
        if not fits(value):
            raise ValueError(problem.format(value))
        return value

    return AfterValidator(refuse)


def is_url(url: str, schemes: str) -> bool:
    """Whether a text is a URL with a host, of one of these schemes."""
    try:
        parts = urlsplit(url)
        return parts.scheme in schemes.split() and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_host_and_port(text: str) -> bool:
    found = _HOST_AND_PORT.fullmatch(text)
    return found is not None and 0 < int(found[2]) <= _MAX_PORT


HttpUrl = Annotated[
    str,
    check(  # addresses are shown in errors, health, turns and logs
        lambda url: "@" not in url.partition("://")[2].partition("/")[0],
        "has a user name or password in a URL; take it out (a key for the engine is engine_api_key)",
    ),
    check(lambda url: not url or is_url(url, "http https"), "{!r} is not an http(s) URL"),
]
HostAndPort = Annotated[
    str, check(lambda text: not text or _is_host_and_port(text), "{!r} is not a name and a port, as in 'engines:8000'")
]


class EngineEntry(BaseModel):
    """One entry of `engines`: an engine and the cache of its node, or a name whose addresses are engines."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    url: HttpUrl = ""
    cache_url: HttpUrl = ""
    discover: HostAndPort = ""
    cache_port: Annotated[int, Field(ge=0, le=_MAX_PORT)] = 0
    cache_discover: HostAndPort = ""

    @model_validator(mode="after")
    def _one_kind(self) -> "EngineEntry":
        if bool(self.url) == bool(self.discover):
            raise ValueError("needs either url, of one engine, or discover, a name whose every address is an engine")
        if self.url and (self.cache_port or self.cache_discover):
            raise ValueError("has url with cache_port or cache_discover, which go with discover: give its cache_url")
        if self.discover and self.cache_url:
            raise ValueError("has discover with cache_url, which goes with url: give cache_port or cache_discover")
        if self.cache_port and self.cache_discover:
            raise ValueError(
                "has cache_port and cache_discover: keep cache_port if the cache is at the engine's own address"
            )
        return self

    @property
    def cache(self) -> str:
        """`cache_url`, spelt alike for all engines of a node; "" without one."""
        return same_url(self.cache_url) if self.cache_url else ""

    @property
    def has_cache(self) -> bool:
        """Whether it names a cache in some way."""
        return bool(self.cache_url or self.cache_port or self.cache_discover)


def same_url(url: str) -> str:
    """A URL as it is compared: host in small letters, no slash at the end."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.lower(), path=parts.path.rstrip("/")).geturl()


def check_engine_urls(urls: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse an empty list, and an engine that is there twice."""
    if not urls or not all(urls):
        raise ValueError("needs the base URL of each engine")
    _refuse_repeated(list(map(same_url, urls)))
    return urls


def check_entries(entries: tuple[EngineEntry, ...]) -> tuple[EngineEntry, ...]:
    """Refuse an engine or a name that is there twice."""
    _refuse_repeated([same_url(one.url) if one.url else one.discover.lower() for one in entries])
    return entries


def _refuse_repeated(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"has {Counter(names).most_common(1)[0][0]} more than once; give each engine once")


EngineUrls = Annotated[tuple[HttpUrl, ...], AfterValidator(check_engine_urls)]
# The entries come as tables; what is in them is checked as strictly as all else.
EngineEntries = Annotated[tuple[Annotated[EngineEntry, Field(strict=False)], ...], AfterValidator(check_entries)]


def where(location: Sequence[Any]) -> str:
    """The place of an error of pydantic within a setting, as `[0].url`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
