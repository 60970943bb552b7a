"""Settings of the tiers: their types, and which of them go together."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator


def _check_prefix(prefix: str) -> str:
    if "@" in prefix:
        raise ValueError("has an @, which LMCache puts after it")
    return prefix


def _check_bucket(name: str) -> str:
    if name and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", name):
        raise ValueError(f"{name!r} is not the name of a bucket (3 to 63 of a-z 0-9 . -)")
    return name


RedisPrefix = Annotated[str, AfterValidator(_check_prefix)]
Bucket = Annotated[str, AfterValidator(_check_bucket)]


def check_tiers(settings: Mapping[str, Any]) -> None:
    """Check what goes together, by the names of the settings. Raises ValueError with the remedy."""
    # Only one of LMCache's adapters has a prefix and knows clusters (lmcache 0.5.6, `l2_adapters`).
    for name in ("kv_redis_prefix", "kv_redis_cluster"):
        if settings[name] and settings["kv_redis_adapter"] != "valkey":
            raise ValueError(f"{name} is of LMCache's `valkey` adapter: set kv_redis_adapter to valkey, or omit it")
    # LMCache takes every object of its bucket for its own, and a lifecycle rule deletes them: pins lie elsewhere.
    bucket, pins_bucket = settings["s3_bucket"], settings["s3_pins_bucket"]
    if bool(bucket) != bool(pins_bucket):
        raise ValueError("the S3 tier needs two buckets: set s3_bucket (LMCache's) and s3_pins_bucket (the gateway's)")
    if bucket and bucket == pins_bucket:
        raise ValueError(f"s3_bucket and s3_pins_bucket are both {bucket!r}: give the pins another bucket")
    if bool(settings["s3_access_key_id"]) != bool(settings["s3_secret_access_key"]):
        raise ValueError("set s3_access_key_id and s3_secret_access_key together, or neither")
