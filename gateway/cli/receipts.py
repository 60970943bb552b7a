"""What the receipts of window operations say, in lines for people."""

from collections.abc import Mapping
from typing import Any

from gateway.cli.output import Row
from gateway.cli.units import about, counted, size, took

_CPU = "cpu"  # the tier that is LMCache's memory, where nothing is pinned


def stored(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A window that was frozen or imported: what of it is stored, and where."""
    receipt = answer["receipt"]
    tokens, tail = f"{receipt['tokens']:,}", receipt["tail_tokens"]
    if receipt["chunks"] and tail:
        tokens += f", of which the last {tail:,} fill no chunk: a thaw recomputes them"
    chunks = f"{receipt['chunks']:,}, of {receipt['chunk_size']:,} tokens each"
    return {
        "window": answer["name"],
        "kv": answer["kv"],
        "tokens": tokens,
        "chunks": chunks if receipt["chunks"] else "none",
        **{tier: _objects(found["objects"], found["bytes"]) for tier, found in receipt["tiers"].items()},
        **_computed(receipt),
        "took": took(receipt["duration_ms"]),
    }


def _computed(receipt: Mapping[str, Any]) -> dict[str, str]:
    """What the engine had to compute for a freeze; an import computes nothing."""
    prompt, cached = receipt.get("prompt_tokens"), receipt.get("cached_tokens")
    if not receipt["chunks"] or "prompt_tokens" not in receipt:
        return {}
    if prompt is None:
        return {"computed": "nothing: all of it was stored already"}
    return {"computed": counted(prompt - (cached or 0), "token")}


def restored(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """A thaw or a prefetch: what was found of the window's KV, and what the engine did not have to compute."""
    expected, found = receipt["chunks_expected"], receipt["chunks_found"]
    parts = [
        f"{found:,} of {expected:,} found" if expected else "none",
        *([f"{receipt['chunks_relinked']:,} put back from pins"] if receipt["chunks_relinked"] else ()),
        *([f"{receipt['chunks_corrupt']:,} damaged"] if receipt["chunks_corrupt"] else ()),
        *([f"{receipt['chunks_prefetched']:,} loaded into memory"] if receipt["chunks_prefetched"] else ()),
    ]
    lines = {"chunks": ", ".join(parts)}
    if receipt.get("cached_tokens") is not None:
        lines["cached"] = f"{receipt['cached_tokens']:,} of {receipt['prompt_tokens']:,} tokens, as the engine counted"
    if receipt["partial"]:
        lines["partial"] = "yes: the engine computes what is missing"
    if receipt.get("saved"):
        lines["saved"] = saved(receipt["saved"], receipt["duration_ms"])
    return lines | {"took": took(receipt["duration_ms"])}


def saved(saved: Mapping[str, Any], duration_ms: float | None = None) -> str:
    """What the cache has saved, and about how long computing it takes; `duration_ms` is what it took instead."""
    if not saved["tokens"]:
        return ""
    instead = "" if duration_ms is None else f" in {took(duration_ms)}"
    tokens = f"{counted(saved['tokens'], 'token')} from the cache{instead}"
    if saved["seconds_estimated"] is None:
        return f"{tokens}; how long computing them takes is not known yet ({saved['reason']})"
    error = "" if saved["error_share"] is None else f" (± {saved['error_share']:.0%})"
    part = saved["tokens_estimated"]
    which = "them" if part == saved["tokens"] else f"{part:,} of them"
    return f"{tokens}; computing {which} takes {about(saved['seconds_estimated'])} here{error}"


def thawed(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """A thaw: as `restored`, what turn it is of, and what it costs if nothing is computed yet."""
    turn = {} if receipt["at_turn"] is None else {"at turn": receipt["at_turn"]}
    lines = turn | restored(receipt)
    if receipt["cached_tokens"] is None:
        took_ms = lines.pop("took")
        lines["to compute"] = f"{counted(receipt['computed_tokens'], 'token')}, in the first turn"
        lines["took"] = took_ms
    return lines


def replaced(what: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a session had before it was taken back to a window."""
    if what is None:
        return {}
    kept = what["kept_in"]
    return {"dropped": f"{counted(what['turns_dropped'], 'turn')}, {f'kept in {kept}' if kept else 'in no window'}"}


def loaded(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A prefetch: what was found, and how many objects each tier has now."""
    tiers = {tier: counted(there["present"], "object") for tier, there in answer.get("tiers", {}).items()}
    return {"window": answer["window_name"], **restored(answer["receipt"]), **tiers}


def evicted(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An eviction: the objects in each tier before and after it."""
    tiers = {
        tier: f"{counted(there['before'], 'object')} before, {there['after']:,} now"
        for tier, there in answer["tiers"].items()
    }
    return {"window": answer["window_name"], **tiers, "took": took(answer["duration_ms"])}


def verified(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A verification: what is intact of the window's KV in each tier."""
    pinned, expected, usable = (answer[f"chunks_{which}"] for which in ("pinned", "expected", "usable"))
    return {
        "window": answer["window_name"],
        "ok": answer["ok"],
        "kv": answer["kv"],
        "chunks": f"{pinned:,} of {expected:,} pinned, {usable:,} usable",
        **{tier: _checked(tier, there) for tier, there in answer["tiers"].items()},
        **{f"{replay['tier']}, used": _replay(replay) for replay in answer["deep"] or ()},
        "took": took(answer["duration_ms"]),
    }


def _checked(tier: str, there: Mapping[str, Any]) -> str:
    if there["checked"]:
        objects = f"{there['intact']:,} of {counted(there['objects'], 'object')} intact"
        return f"{objects}, {there['damaged']:,} damaged, {there['missing']:,} missing"
    if tier == _CPU:
        return f"{there['present']:,} of {counted(there['objects'], 'object')} loaded"
    return "could not be checked"


def _replay(replay: Mapping[str, Any]) -> str:
    used = f"{replay['cached_tokens']:,} of {counted(replay['expected_cached_tokens'], 'token')} loaded"
    if replay["equal"]:
        largest = replay["largest_logprob_difference"]
        within = f", log probabilities within {largest:.1g}" if largest else ""
        return f"{counted(replay['tokens_compared'], 'token')} equal{within}, {used}"
    first = replay["first_difference"]
    return f"differs from token {first['position']} on, {used}" if first else f"not all was used: {used}"


def deleted(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A deleted window or session: what it freed."""
    freed = f"{size(answer['space_freed_bytes'])} in {counted(answer['blocks_deleted'], 'object')}"
    return {"freed": freed if answer["blocks_deleted"] else "nothing"}


def pinned_tiers(cache: Mapping[str, Any]) -> list[Row]:
    """The tiers that have a window's KV: what is pinned there, and what LMCache finds."""
    return [
        {
            "tier": tier,
            "pinned": "" if tier == _CPU else f"{there['pinned']:,} of {cache['block_count']:,}",
            "size": size(there["pinned_bytes"]) if there["pinned"] else "",
            "found by LMCache": f"{there['present']:,}",
        }
        for tier, there in cache["tiers"].items()
    ]


def _objects(count: int, total_bytes: int) -> str:
    return f"{counted(count, 'object')}, {size(total_bytes)}"
