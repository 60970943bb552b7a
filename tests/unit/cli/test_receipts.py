"""What receipts say to people."""

from typing import Any

from gateway.cli import receipts

STORED: dict[str, Any] = {
    "tokens": 1208, "chunks": 18, "chunk_size": 64, "tail_tokens": 56, "bytes": 3 * 2**20, "kv": "complete",
    "tiers": {"disk": {"objects": 18, "bytes": 3 * 2**20}}, "duration_ms": 66.2,
}  # fmt: skip
RESTORED: dict[str, Any] = {
    "chunks_expected": 3, "chunks_found": 3, "chunks_relinked": 0, "chunks_corrupt": 0, "chunks_prefetched": None,
    "partial": False, "duration_ms": 110.0,
}  # fmt: skip


def stored(**more: Any) -> dict[str, Any]:
    """The lines of a freeze or an import."""
    return receipts.stored({"name": "w", "kv": "complete", "receipt": {**STORED, **more}})


def test_freeze_says_what_was_stored_and_computed() -> None:
    assert stored(prompt_tokens=64, cached_tokens=32) == {
        "window": "w",
        "kv": "complete",
        "tokens": "1,208, of which the last 56 fill no chunk: a thaw recomputes them",
        "chunks": "18, of 64 tokens each",
        "disk": "18 objects, 3.0 MiB",
        "computed": "32 tokens",
        "took": "66 ms",
    }
    assert stored(prompt_tokens=64, cached_tokens=None)["computed"] == "64 tokens"
    assert stored(prompt_tokens=None, cached_tokens=None)["computed"] == "nothing: all of it was stored already"
    assert stored(tail_tokens=0)["tokens"] == "1,208"


def test_import_computes_nothing_and_says_nothing_of_it() -> None:
    assert "computed" not in stored(imported={"name": "v"})


def test_window_without_kv_has_neither_chunks_nor_a_tail() -> None:
    lines = stored(chunks=0, chunk_size=0, tail_tokens=1208, tiers={}, prompt_tokens=None, cached_tokens=None)
    assert lines == {"window": "w", "kv": "complete", "tokens": "1,208", "chunks": "none", "took": "66 ms"}


def test_thaw_says_what_was_found_and_what_was_cached() -> None:
    assert receipts.restored(RESTORED) == {"chunks": "3 of 3 found", "took": "110 ms"}
    measured = {**RESTORED, "chunks_prefetched": 3, "cached_tokens": 192, "prompt_tokens": 1208}
    assert receipts.restored(measured) == {
        "chunks": "3 of 3 found, 3 loaded into memory",
        "cached": "192 of 1,208 tokens, as the engine counted",
        "took": "110 ms",
    }


def test_partial_thaw_says_what_is_missing() -> None:
    partial = {**RESTORED, "chunks_found": 1, "chunks_relinked": 1, "chunks_corrupt": 2, "partial": True}
    assert receipts.restored(partial) == {
        "chunks": "1 of 3 found, 1 put back from pins, 2 damaged",
        "partial": "yes: the engine computes what is missing",
        "took": "110 ms",
    }


def test_deletion_says_what_it_freed() -> None:
    assert receipts.deleted({"blocks_deleted": 0, "space_freed_bytes": 0}) == {"freed": "nothing"}
    assert receipts.deleted({"blocks_deleted": 2, "space_freed_bytes": 2**21}) == {"freed": "2.0 MiB in 2 objects"}


def test_verification_tells_tiers_that_are_checked_from_those_that_are_not() -> None:
    there = {"checked": True, "objects": 3, "intact": 2, "damaged": 1, "missing": 0, "present": 3}
    out_of_reach = {"checked": False, "objects": 3, "intact": 0, "damaged": 0, "missing": 0, "present": 2}
    answer = {
        "window_name": "w", "ok": False, "kv": "complete", "chunks_expected": 3, "chunks_pinned": 3, "chunks_usable": 1,
        "tiers": {"disk": there, "redis": out_of_reach, "cpu": out_of_reach}, "deep": None, "duration_ms": 5,
    }  # fmt: skip
    lines = receipts.verified(answer)
    assert lines["chunks"] == "3 of 3 pinned, 1 usable"
    assert lines["disk"] == "2 of 3 objects intact, 1 damaged, 0 missing"
    assert (lines["redis"], lines["cpu"]) == ("could not be checked", "2 of 3 objects loaded")


def test_deep_verification_says_how_close_the_log_probabilities_are() -> None:
    used: dict[str, Any] = {"tier": "disk", "equal": True, "tokens_compared": 16, "first_difference": None}
    used |= {"cached_tokens": 128, "expected_cached_tokens": 128, "largest_logprob_difference": 0.0}
    answer: dict[str, Any] = {
        "window_name": "w", "ok": True, "kv": "complete", "chunks_pinned": 2, "chunks_expected": 2, "chunks_usable": 2,
        "tiers": {}, "deep": [used], "duration_ms": 5,
    }  # fmt: skip
    assert receipts.verified(answer)["disk, used"] == "16 tokens equal, 128 of 128 tokens loaded"
    used["largest_logprob_difference"] = 0.0307
    said = receipts.verified(answer)["disk, used"]
    assert said == "16 tokens equal, log probabilities within 0.03, 128 of 128 tokens loaded"


def test_tiers_of_a_window_say_what_is_pinned_where() -> None:
    cache = {
        "block_count": 3,
        "tiers": {
            "cpu": {"pinned": 0, "pinned_bytes": 0, "present": 3},
            "disk": {"pinned": 3, "pinned_bytes": 3 * 2**20, "present": 2},
        },
    }
    assert receipts.pinned_tiers(cache) == [
        {"tier": "cpu", "pinned": "", "size": "", "found by LMCache": "3"},
        {"tier": "disk", "pinned": "3 of 3", "size": "3.0 MiB", "found by LMCache": "2"},
    ]


SAVED: dict[str, Any] = {
    "requests": 1, "prompt_tokens": 4050, "tokens": 4032, "seconds_estimated": 9.51, "tokens_estimated": 4032,
    "error_share": 0.08, "reason": None,
}  # fmt: skip


def test_thaw_says_what_it_saved_and_that_this_is_estimated() -> None:
    lines = receipts.restored({**RESTORED, "duration_ms": 310.0, "saved": SAVED})
    assert lines["saved"] == "4,032 tokens from the cache in 310 ms; computing them takes about 9.5 s here (± 8%)"
    assert "saved" not in receipts.restored({**RESTORED, "saved": None})


def test_what_was_saved_is_not_estimated_where_nothing_is_known() -> None:
    unknown = {**SAVED, "seconds_estimated": None, "tokens_estimated": 0, "error_share": None, "reason": "too few"}
    assert receipts.saved(unknown) == (
        "4,032 tokens from the cache; how long computing them takes is not known yet (too few)"
    )
    part = {**SAVED, "seconds_estimated": 845.0, "tokens_estimated": 1000, "error_share": None}
    assert receipts.saved(part) == ("4,032 tokens from the cache; computing 1,000 of them takes about 14 min here")
    assert receipts.saved({**SAVED, "tokens": 0}) == ""
