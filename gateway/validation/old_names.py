"""The settings of Context Window Manager (cwm-mcp), and what they are called here."""

from collections.abc import Mapping
from types import MappingProxyType

_OLD_PREFIX = "CWM_"
_OLD_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "CWM_VLLM_URL": "CWG_ENGINE_URLS",
        "CWM_VLLM_API_KEY": "CWG_ENGINE_API_KEY",
        "CWM_VLLM_TIMEOUT": "CWG_ENGINE_TIMEOUT_S",
        "CWM_DB_PATH": "CWG_STORE_URL",
        "CWM_STORAGE_DISK_PATH": "CWG_KV_DIR",
        "CWM_STORAGE_PATH": "CWG_KV_DIR",
        "CWM_CPU_CACHE_GB": "the option --cpu-cache-gb of `cwg up`",
        "CWM_STORAGE_CPU_MAX_GB": "the option --cpu-cache-gb of `cwg up`",
        "CWM_DISK_CACHE_GB": "CWG_DISK_BUDGET_BYTES (bytes)",
        "CWM_STORAGE_DISK_MAX_GB": "CWG_DISK_BUDGET_BYTES (bytes)",
        "CWM_STORAGE_REDIS_URL": "CWG_KV_REDIS_URL",
        "CWM_LIMITS_MAX_SESSIONS": "CWG_SESSIONS_KEPT",
        "CWM_LIMITS_MAX_STORAGE_GB": "CWG_DISK_BUDGET_BYTES, CWG_REDIS_BUDGET_BYTES or CWG_TENANT_BUDGET_BYTES (bytes)",
        "CWM_LOG_LEVEL": "CWG_LOG_LEVEL",
        "CWM_AUTO_FREEZE_ENABLED": "CWG_AUTO_FREEZE",
        "CWM_AUTO_FREEZE_TOKEN_THRESHOLD": "CWG_AUTO_FREEZE_TOKENS",
    }
)


def old_variables(environment: Mapping[str, str]) -> str:
    """Which variables of Context Window Manager are set, and their names here; empty if there are none."""
    names = sorted(name for name in environment if name.startswith(_OLD_PREFIX))
    found = [(name, _OLD_NAMES.get(name.replace("__", "_"))) for name in names]
    told = [f"{name} is {new} here" if new else f"{name} has no counterpart" for name, new in found]
    return f"variables of cwm-mcp are ignored: {', '.join(told)}" if told else ""
