"""What LMCache's metrics and status tell about its memory."""

import pytest

from gateway.kv.memory import MemoryRecord, MemoryUse, Moves

METRICS = b"""\
process_start_time_seconds 1.79604918427e+09
# TYPE lmcache_mp_l1_write_chunks_total counter
lmcache_mp_l1_write_chunks_total{cache_salt="aa",l1_tag="_default"} 12.0
lmcache_mp_l1_write_chunks_total{cache_salt="aa",l1_tag="other"} 1.0
lmcache_mp_l1_write_chunks_total{l1_tag="_default",cache_salt="bb"} 7.0
lmcache_mp_l1_evicted_chunks_total{cache_salt="aa",l1_tag="_default"} 3.0
"""


def test_moves_are_counted_by_salt() -> None:
    assert Moves.read(METRICS, "aa") == Moves("1.79604918427e+09", 13, 3)
    assert Moves.read(METRICS, "bb") == Moves("1.79604918427e+09", 7, 0)
    assert Moves.read(METRICS, "a") == Moves("1.79604918427e+09", 0, 0)


def test_other_metrics_tell_nothing() -> None:
    assert Moves.read(b"", "aa") is None
    assert Moves.read(b"process_start_time_seconds 1.7e+09\n", "aa") is None


@pytest.mark.parametrize(
    "line",
    [
        b'lmcache_mp_l1_evicted_chunks_total{cache_salt="aa"} Inf\n',
        b'lmcache_mp_l1_evicted_chunks_total{cache_salt="aa"} NaN\n',
        b'lmcache_mp_l1_evicted_chunks_total{cache_salt="aa"} \xff\n',
        b'lmcache_mp_l1_evicted_chunks_total{cache_salt="aa"}\n',
        b"process_start_time_seconds \xff\n",
    ],
)
def test_garbage_tells_nothing(line: bytes) -> None:
    assert Moves.read(line + METRICS, "aa") is None


def test_a_line_that_is_cut_off_does_not_count() -> None:
    cut = METRICS + b'lmcache_mp_l1_evicted_chunks_total{cache_salt="aa",l1_tag="other"} 1'
    assert Moves.read(cut, "aa") == Moves("1.79604918427e+09", 13, 3)


def test_usage_is_summed_over_all_levels() -> None:
    level = {"total_object_count": 2, "memory_used_bytes": 10, "memory_configured_bytes": 100}
    status = {"storage_manager": {"l1_managers": {"a": level, "b": level}}}
    assert MemoryUse.read(status) == MemoryUse(4, 20, 200)
    assert MemoryUse.read({"chunk_size": 64}) is None


@pytest.mark.parametrize("is_there", [True, False])
def test_counters_that_shrink_tell_nothing(is_there: bool) -> None:
    record, before = MemoryRecord(), Moves("p", 5, 3)
    record.remember("m", "s", before, is_there=is_there)
    assert record.is_there("m", "s", before) is is_there
    assert record.is_there("m", "s", Moves("p", 4, 3)) is None
    assert record.is_there("m", "s", Moves("p", 5, 0)) is None


def test_record_is_bounded() -> None:
    record, counted = MemoryRecord(), Moves("p", 0, 0)
    for number in range(1001):
        record.remember(str(number), "s", counted, is_there=True)
    assert (record.knows("0", "s"), record.knows("1", "s")) == (False, True)
