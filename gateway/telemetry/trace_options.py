"""Tracing as OpenTelemetry's own variables configure it; the exporter reads those of its connection itself.

https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/. What they say and the gateway cannot
do stops the start.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from gateway.errors import StartError
from gateway.validation.shown import shown

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_TIMEOUTS = ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")
_COMPRESSIONS = ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "OTEL_EXPORTER_OTLP_COMPRESSION")
_SAMPLERS = ("always_on", "always_off", "traceidratio")
_PARENT_BASED = "parentbased_"
_QUEUE, _BATCH, _DELAY = "OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "OTEL_BSP_SCHEDULE_DELAY"
_LOW_64: Final = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Sampler:
    """Which traces are recorded: `share` (0 to 1) of those that begin here, and of others if not `follows_parent`."""

    share: float = 1.0
    follows_parent: bool = True

    def begins(self, trace_id: int) -> bool:
        """Whether a trace is recorded that begins here: the same in every process that samples by its id."""
        return (trace_id & _LOW_64) < round(self.share * 2**64)


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """Where spans go, as far as it may be shown, which of them, and how many may wait in memory."""

    endpoint: str
    sampler: Sampler
    queue: int
    batch: int
    delay_ms: int

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "TraceOptions | None":
        """Read the variables; None if no spans are wanted. Raises StartError for values that cannot be used."""
        given = {name: value.strip() for name, value in environment.items() if value.strip()}
        name, endpoint = _first(given, _ENDPOINTS)
        if not endpoint or given.get("OTEL_SDK_DISABLED", "").lower() == "true" or not _is_exported(given):
            return None
        _check_protocol(given)
        _check_connection(given)
        queue, batch = _count(given, _QUEUE, 2048), _count(given, _BATCH, 512)
        if batch > queue:
            raise StartError(f"{_BATCH} is {batch}, more than {_QUEUE} ({queue}): a batch comes out of the queue")
        return cls(_shown(name, endpoint), _sampler(given), queue, batch, _count(given, _DELAY, 5000))


def _first(given: Mapping[str, str], names: tuple[str, ...]) -> tuple[str, str]:
    """The first of some variables that is set, and its value; empty if none is."""
    return next(((name, given[name]) for name in names if name in given), ("", ""))


def _is_exported(given: Mapping[str, str]) -> bool:
    exporter = given.get("OTEL_TRACES_EXPORTER", "otlp").lower()
    if exporter not in ("otlp", "none"):
        raise StartError(f"OTEL_TRACES_EXPORTER is {shown(exporter)}: set otlp, the only exporter here, or none")
    return exporter == "otlp"


def _check_protocol(given: Mapping[str, str]) -> None:
    name, protocol = _first(given, _PROTOCOLS)
    if protocol and protocol.lower() != "http/protobuf":
        hint = "set it to http/protobuf, and the endpoint to the collector's port for that (4318 by default)"
        raise StartError(f"{name} is {shown(protocol)}, which the gateway does not speak: {hint}")


def _check_connection(given: Mapping[str, str]) -> None:
    """Check what the exporter would only fail on with an error of its own."""
    name, timeout = _first(given, _TIMEOUTS)
    if timeout and not _number(timeout) > 0:
        raise StartError(f"{name} is {shown(timeout)}: set a number of seconds")
    name, compression = _first(given, _COMPRESSIONS)
    if compression and compression.lower() not in ("none", "gzip", "deflate"):
        raise StartError(f"{name} is {shown(compression)}: set none, gzip or deflate")


def _shown(name: str, endpoint: str) -> str:
    """The endpoint without a password. Raises StartError if it is no URL."""
    try:
        parts = urlsplit(endpoint)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise StartError(f"{name} is no http(s) URL: set one such as http://localhost:4318")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def _sampler(given: Mapping[str, str]) -> Sampler:
    name = given.get("OTEL_TRACES_SAMPLER", "parentbased_always_on").lower()
    kind = name.removeprefix(_PARENT_BASED)
    if kind not in _SAMPLERS:
        known = ", ".join((*_SAMPLERS, *(_PARENT_BASED + one for one in _SAMPLERS)))
        raise StartError(f"OTEL_TRACES_SAMPLER is {shown(name)}: set one of {known}")
    share = {"always_on": 1.0, "always_off": 0.0}.get(kind)
    return Sampler(_ratio(given) if share is None else share, name != kind)


def _ratio(given: Mapping[str, str]) -> float:
    text = given.get("OTEL_TRACES_SAMPLER_ARG", "1")
    ratio = _number(text)
    if not 0 <= ratio <= 1:
        raise StartError(f"OTEL_TRACES_SAMPLER_ARG is {shown(text)}: set the share of traces to record, 0 to 1")
    return ratio


def _count(given: Mapping[str, str], name: str, default: int) -> int:
    text = given.get(name, str(default))
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise StartError(f"{name} is {shown(text)}: set a whole number above 0")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
