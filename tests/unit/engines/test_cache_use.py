"""How full an engine's own cache is, as its metrics tell."""

from gateway.engines.cache_use import CacheUse

METRICS = """\
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.25
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",cache_dtype="auto",engine="0",num_cpu_blocks="None",num_gpu_blocks="512"} 1.0
"""


def test_capacity_and_usage_are_read() -> None:
    assert CacheUse.read(METRICS) == CacheUse(32 * 512, 0.25)


def test_engine_that_does_not_say_is_unknown() -> None:
    assert CacheUse.read("vllm:num_requests_running 0.0\n") is None
    assert CacheUse.read(METRICS.replace('"512"', '"None"')) is None


def test_total_weighs_usage_by_capacity() -> None:
    assert CacheUse.total([CacheUse(100, 1.0), CacheUse(300, 0.0)]) == CacheUse(400, 0.25)
