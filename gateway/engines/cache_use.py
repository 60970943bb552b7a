"""How full an engine's own prefix cache is, from its metrics (vLLM 0.32, `v1/metrics/loggers.py`).

vLLM tells it for the whole engine, not by salt or by prompt: what it holds of one window is not known.
"""

import re
from dataclasses import dataclass

_USAGE = re.compile(r"^vllm:kv_cache_usage_perc(?:\{[^}]*\})? (\S+)", re.MULTILINE)
_CONFIG = re.compile(r"^vllm:cache_config_info\{([^}]*)\}", re.MULTILINE)
_LABEL = re.compile(r'(block_size|num_gpu_blocks)="(\d+)"')


@dataclass(frozen=True, slots=True)
class CacheUse:
    """Tokens that fit into an engine's own KV cache, and the share of it that running requests use (0 to 1)."""

    capacity_tokens: int
    usage: float

    @classmethod
    def read(cls, metrics: str) -> "CacheUse | None":
        """Read an engine's metrics; None if they do not say."""
        usages = [float(value) for value in _USAGE.findall(metrics)]
        labels = [dict(_LABEL.findall(config)) for config in _CONFIG.findall(metrics)]
        sizes = [int(one["block_size"]) * int(one["num_gpu_blocks"]) for one in labels if len(one) == 2]
        if not usages or not sizes:
            return None
        return cls(sum(sizes), sum(usages) / len(usages))

    @classmethod
    def total(cls, engines: "list[CacheUse]") -> "CacheUse":
        """All engines together; there is at least one."""
        tokens = sum(one.capacity_tokens for one in engines)
        used = sum(one.usage * one.capacity_tokens for one in engines)
        return cls(tokens, used / tokens if tokens else 0.0)
