"""What a drain costs and saves on the real stack: two nodes, each with a vLLM and an LMCache, over one tier.

`python -m loadtests.two_nodes` starts both nodes and a gateway in front of them, holds conversations, and drains the
engine that has most of them. Measured are the drain, and the next turn of each session that it moved, at the other
engine: tokens that this engine found, and the time to its first token, beside a prompt of the same length that the
same engine has to compute. Needs about 5 GB of memory. Writes a table.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from gateway.stack import local, trial_tiers
from loadtests import machine
from tests.stack.driver import Gateway, converse
from tests.support import local_stack
from tests.support.second_node import pair_settings, second_node

_NEXT = {"role": "user", "content": "Are you still there?"}


@dataclass(frozen=True, slots=True)
class Moved:
    """The first turn of a moved session, and a prompt of as many tokens that nobody had sent before."""

    tokens: int
    whole_chunks: int  # tokens in the chunks of its window
    cached: int
    first_ms: float
    cold_ms: float


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--words", type=int, default=500, help="of each question; a conversation has two")
    parser.add_argument("--tier", choices=["disk", "redis", "s3"], default="disk")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="results directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="two-nodes-") as folder:
        stack = local.LocalStack(
            data_dir=Path(folder) / "data", demo="random", max_model_len=16_384, cpu_cache_gb=0.5, engine_kv_gb=0.5,
            tiers=(options.tier,),
            # A seeded request whose prompt takes two steps ends vLLM 0.32 on a CPU: its generator has no offset.
            engine_args=("--max-num-batched-tokens", "16384"),
        )  # fmt: skip
        with local_stack.running(stack) as (one, _), second_node(one) as (two, _):
            report = _measure(one, two, Path(folder), options.sessions, options.words)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / ("two_nodes.md" if options.tier == "disk" else f"two_nodes_{options.tier}.md")).write_text(report)
    print(report)


def _measure(one: local.Plan, two: local.Plan, folder: Path, sessions: int, words: int) -> str:
    settings = {
        "CWG_ENGINES": pair_settings(one, two), "CWG_DATA_DIR": str(folder / "gateway"), "CWG_AUTO_FREEZE": "false",
        "CWG_ENGINE_CHECK_S": "0.5", **dict(trial_tiers.settings(one)),
    }  # fmt: skip
    gateway = Gateway(settings, folder / "gateway.log").start()
    try:
        thawed = _thaw_elsewhere(gateway, words)
        talks = {f"s-{n}": converse(gateway.client(f"s-{n}"), f"topic {n}", 2, words) for n in range(sessions)}
        homes = {name: str(gateway.http.get(f"/admin/sessions/{name}").json()["engine"]) for name in talks}
        home = max(homes.values(), key=list(homes.values()).count)
        began = time.perf_counter()
        drained = gateway.http.post("/admin/engines/drain", json={"engine": home}).raise_for_status().json()
        took_s = time.perf_counter() - began
        moved = [_first_turn(gateway, one, talk, words) for talk in _moved(drained, talks)]
        return _report(moved, took_s, drained, sessions, f"{one.options.tiers[0]}. {thawed}")
    finally:
        gateway.close()


def _thaw_elsewhere(gateway: Gateway, words: int) -> str:
    """Freeze on one node, thaw on the other, with nothing of it in the memory of either."""
    converse(gateway.client("frozen"), "a frozen topic", 2, words)
    home = gateway.http.get("/admin/sessions/frozen").json()["engine"]
    window = gateway.freeze("frozen", "from-one-node")
    gateway.http.post("/admin/engines/drain", json={"engine": home}).raise_for_status()
    gateway.http.post("/admin/windows/from-one-node/evict", json={}).raise_for_status()
    thawed = gateway.thaw("from-one-node", warm="gpu")
    gateway.http.post("/admin/engines/drain", json={"engine": home, "undo": True}).raise_for_status()
    chunks, receipt = window["receipt"]["chunks"], thawed["receipt"]
    return (
        f"A window of {chunks} chunks, frozen on one node in {window['receipt']['duration_ms']:,.0f} ms, thawed on the "
        f"other in {receipt['duration_ms']:,.0f} ms: {receipt['chunks_prefetched']} chunks came from the tier, and the "
        f"engine found {receipt['cached_tokens']:,} of the {chunks * window['receipt']['chunk_size']:,} tokens in them."
    )


def _moved(drained: dict[str, Any], talks: dict[str, list[dict[str, Any]]]) -> list[tuple[dict[str, Any], Any]]:
    return [(one, talks[one["session_id"]]) for one in drained["moved"]]


def _first_turn(gateway: Gateway, plan: local.Plan, talk: tuple[dict[str, Any], Any], words: int) -> Moved:
    """The next turn of a moved session, and a new conversation of the same shape at the same engine."""
    one, messages = talk
    window = gateway.http.get(f"/admin/windows/{one['window_name']}").json()
    usage, first_ms = _turn(gateway, one["session_id"], [*messages, _NEXT])
    other = [{**message, "content": f"never said {message['content']}"} for message in messages]
    _, cold_ms = _turn(gateway, f"{one['session_id']}-cold", [*other, _NEXT])
    receipt = window["receipt"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Moved(usage["prompt_tokens"], receipt["chunks"] * receipt["chunk_size"], cached, first_ms, cold_ms)


def _turn(gateway: Gateway, session: str, messages: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], float]:
    body = {"model": "demo", "messages": list(messages), "max_tokens": 1, "temperature": 0}
    with httpx.Client(base_url=gateway.url, timeout=600) as client:
        began = time.perf_counter()
        answer = client.post(f"/s/{session}/v1/chat/completions", json=body).raise_for_status().json()
        return dict(answer["usage"]), (time.perf_counter() - began) * 1000


def _report(moved: Sequence[Moved], took_s: float, drained: dict[str, Any], sessions: int, tier: str) -> str:
    ratio = statistics.median(m.cold_ms / m.first_ms for m in moved) if moved else 0.0
    all_hit = sum(m.cached >= m.whole_chunks for m in moved)
    return f"""# Draining one of two nodes

{", ".join(machine.describe().values())}. vLLM and LMCache twice, the small demo model, one tier: {tier}

Of {sessions} sessions {len(moved)} were at the drained engine.

The drain took {took_s:.1f} s for {len(moved)} sessions; {len(drained["failed"])} could not be frozen. Of the moved
sessions {all_hit} of {len(moved)} hit every whole chunk at the other engine. Their next turn was {ratio:.1f} times as
fast as a prompt of that length that it had to compute (median).

| tokens of the turn | in whole chunks | found by the other engine | first token | computed instead |
|---:|---:|---:|---:|---:|
{"".join(map(_row, moved))}"""


def _row(one: Moved) -> str:
    counts = f"| {one.tokens:,} | {one.whole_chunks:,} | {one.cached:,} "
    return f"{counts}| {one.first_ms:,.0f} ms | {one.cold_ms:,.0f} ms |\n"


if __name__ == "__main__":
    main()
