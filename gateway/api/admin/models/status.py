"""The cache, health and metrics."""

from typing import Annotated, Literal

from pydantic import Field

from gateway.api.admin.models.responses import Answer, Number, Warnings, absent
from gateway.api.selftest import Status


class NodeCache(Answer):  # one LMCache server
    url: str
    status: Literal["healthy", "left out", "unhealthy"]
    message: str
    engines: list[str] = Field(description="those of its node")


class LMCacheStatus(Answer):
    status: Literal["healthy", "unhealthy", "unreachable", "not configured"]
    chunk_size: int = absent()
    hash_algorithm: str = absent()
    adapters: list[str] = absent()


class Share(Answer):
    objects: int
    bytes: int


class CacheTier(Share):
    pinned: Share
    windows: Share
    sessions: Share
    forgotten: Share
    unknown: Share
    listed: bool = Field(
        description="false for S3, whose bucket is never listed: then only pins are counted, from the gateway's store"
    )


class MemoryTier(Share):  # LMCache's memory, `cpu`
    capacity_bytes: int


class NodeMemory(NodeCache):
    chunk_size: int | None
    memory: MemoryTier | None = Field(description="null if it does not say")


class EngineTier(Answer):  # the engines' own cache, `gpu`, also that of a CPU engine
    capacity_tokens: int
    usage: Number = Field(description="share that running requests use, 0 to 1; the rest holds what may be reused")


class Cache(Answer):
    windows: int
    prompt_tokens: int
    cached_tokens: int
    hit_rate: Annotated[Number | None, Field(description="of all prompts since the gateway started")]
    chunk_size: int | None
    engines_up: int
    lmcache: LMCacheStatus = Field(description="all caches together; `nodes` has each")
    nodes: list[NodeMemory] = Field(description="every cache with its memory; `cpu` among the tiers is their sum")
    tiers: dict[str, CacheTier | MemoryTier | EngineTier]
    warnings: Warnings


Wellness = Literal["healthy", "degraded", "unhealthy"]


class Engine(Answer):
    url: str
    state: str
    failures: int
    last_error: str | None
    models: list[str]
    cache_url: str | None = Field(description="the cache of its node; null: none, or not found out yet")


class Component(Answer):
    status: Wellness
    message: str
    latency_ms: Number
    engines: list[Engine] = absent()
    caches: list[NodeCache] = absent()
    models_differ: dict[str, dict[str, str]] = absent()


class Components(Answer):
    engine: Component = absent()
    cache: Component = absent()
    tiers: Component = absent()
    store: Component = absent()
    isolation: Component = absent()


class Health(Answer):
    status: Wellness
    version: str
    pid: int
    uptime_seconds: Number
    components: Components


class Check(Answer):
    name: str
    status: Status
    message: str
    remedy: str


class Doctor(Answer):
    ok: bool = Field(description="no check failed, and windows keep KV")
    keeps_kv: bool | None = Field(
        description="whether KV was seen to survive in a tier; if not, windows keep text only; null: not tested"
    )
    checks: list[Check]


class Metric(Answer):
    name: str
    type: str
    help: str
    labels: dict[str, str]
    value: Number


class JsonMetrics(Answer):
    format: Literal["json"]
    metrics: list[Metric]


class PrometheusMetrics(Answer):
    format: Literal["prometheus"]
    content: str


Metrics = Annotated[JsonMetrics | PrometheusMetrics, Field(discriminator="format")]


class Alive(Answer):
    status: Literal["ok"]


class Ready(Answer):
    status: Literal["ready"]


class NotReady(Answer):
    status: Literal["not ready"]
    waiting_for: str
    reason: str
