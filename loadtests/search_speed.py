"""How long searches take, and what they cost the recording of turns.

    python -m loadtests.search_speed [--windows 10000] [--searches 300] [--turns 400] [--out FILE]

A store with so many windows, each of ten messages of its own, is filled and indexed. Then

- turns are recorded, each in a transaction of its own, in turn into this store and into one that was filled alike and
  is not indexed: what the index costs is the difference of the two;
- searches run one after another while turns are recorded: rare words, several words, common words, names, text in
  Chinese, and nothing at all; through the list of windows and ranked.

Words are drawn as in natural language, the n-th most common one with a frequency of about 1/n.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from gateway.dialects.search_text import Search
from gateway.records import Manifest, Session, Trace, Turn, Usage, Window
from gateway.store.sqlite import SqliteStore
from gateway.store.types import Text, TurnRecord, WindowQuery
from loadtests.machine import describe

_MESSAGES = 10  # of a window
_WORDS = 20_000  # different ones
_TENANT = "default"
_LIMITS_MS = (50, 150)  # median and p99 of a search
_LIMIT_SHARE = 1.05  # of recording

Timed = Callable[[], Awaitable[object]]


class _Texts:
    """Messages of random words."""

    def __init__(self) -> None:
        self._random = random.Random(14)
        self.words = ["".join(self._random.choices("abcdefghijklmnopqrstuvwxyz", k=2 + n % 9)) for n in range(_WORDS)]
        self._weights = list(_cumulated(1 / (n + 1) for n in range(_WORDS)))

    def conversation(self, name: str) -> list[dict[str, object]]:
        """A conversation that names itself once."""
        roles = ("user", "assistant")
        said = [
            " ".join(self._random.choices(self.words, cum_weights=self._weights, k=(20, 120)[n % 2]))
            for n in range(_MESSAGES)
        ]
        said[3] += f" {name} 請求書の番号は{name}です"
        return [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]


def _cumulated(weights: Iterator[float]) -> Iterator[float]:
    total = 0.0
    for weight in weights:
        total += weight
        yield total


def _window(name: str, created_at: float) -> Window:
    return Window(
        tenant=_TENANT, name=f"w-{name}", session_id=f"s-{name}", lineage=name, salt=name, pin_salt=name, model="demo",
        model_root="demo", fingerprint="fp", world_size=1, token_count=10, chunk_size=256, manifest=f"m-{name}",
        created_at=created_at, description=f"the window of {name}", tags=("bench",),
        receipt={"tokens": 10, "tiers": {}},
    )  # fmt: skip


def _record(name: str, messages: list[dict[str, object]]) -> TurnRecord:
    turn = Turn(_TENANT, name, "demo", "completed", 200, time.time(), 500.0, Usage(10, 10, 0))
    trace = Trace(name.encode(), name.encode(), name.encode())
    return TurnRecord(turn, Session(_TENANT, name, name), "fp", name, messages, {}, trace)


async def _fill(store: SqliteStore, texts: Sequence[list[dict[str, object]]]) -> None:
    for start in range(0, len(texts), 200):
        numbers = range(start, min(start + 200, len(texts)))
        await asyncio.gather(
            *(
                store.add_window(_window(f"n{n:06}", float(n)), Manifest(f"m-n{n:06}", (), ()), Text(texts[n], {}))
                for n in numbers
            )
        )


async def _index(store: SqliteStore) -> float:
    started = time.monotonic()
    while await store._index_some(200):
        pass
    return time.monotonic() - started


async def _timed(work: Timed) -> float:
    started = time.perf_counter()
    await work()
    return (time.perf_counter() - started) * 1000


async def _record_both(stores: Sequence[SqliteStore], texts: _Texts, turns: int) -> list[list[float]]:
    """The times of recording the same turns into each store, in turn, in milliseconds."""
    times: list[list[float]] = [[] for _ in stores]
    order = list(range(len(stores)))
    for number in range(turns):
        messages = texts.conversation(f"t{number}")
        random.shuffle(order)
        for end in (2, 4):
            for which in order:
                one = _record(f"t{number}", messages[:end])
                times[which].append(await _timed(lambda s=stores[which], r=one: s.record([r])))  # type: ignore[misc]
    return times


def _searches(store: SqliteStore, texts: _Texts, count: int) -> Iterator[tuple[str, Timed]]:
    """Searches of each kind, in turn."""
    draw = random.Random(15)
    kinds = {
        "one window": lambda: f"n{draw.randrange(1000):06}",
        "rare word": lambda: draw.choice(texts.words[2000:]),
        "three words": lambda: " ".join(draw.sample(texts.words[100:1000], 3)),
        "common word": lambda: draw.choice(texts.words[:100]),
        "Chinese": lambda: "請求書",
        "name": lambda: f"w-n{draw.randrange(1000):05}",
        "nothing": lambda: "zzzzzzzzzzzz qqqq",
    }
    for _ in range(count):
        for kind, text in kinds.items():
            value = text()
            query = WindowQuery(search=value)
            yield f"list, {kind}", lambda q=query: store.search_windows(_TENANT, q)  # type: ignore[misc]
            yield f"ranked, {kind}", lambda v=value: store.search(_TENANT, Search(v), 20)  # type: ignore[misc]
    for _ in range(count):
        question = (
            f"what did we decide about {draw.choice(texts.words[500:5000])} and {draw.choice(texts.words[500:5000])}?"
        )
        yield "question", lambda q=question: store.search(_TENANT, Search(q, every=False), 20)  # type: ignore[misc]


async def _search_while_recording(store: SqliteStore, texts: _Texts, count: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}
    indexing = asyncio.create_task(store.keep_searchable())
    recording = asyncio.create_task(_keep_recording(store, texts))
    for kind, work in _searches(store, texts, count):
        times.setdefault(kind, []).append(await _timed(work))
    for task in (recording, indexing):
        task.cancel()
    await asyncio.gather(recording, indexing, return_exceptions=True)
    return times


async def _keep_recording(store: SqliteStore, texts: _Texts) -> None:
    number = 0
    while True:
        await store.record([_record(f"r{number}", texts.conversation(f"r{number}")[:2])])
        number += 1
        await asyncio.sleep(0.02)


def _row(name: str, times: Sequence[float]) -> str:
    ordered = sorted(times)
    p99 = ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)]
    return f"| {name} | {len(times)} | {statistics.median(times):.1f} | {p99:.1f} |"


async def _measure(folder: Path, windows: int, searches: int, turns: int) -> tuple[list[str], bool]:
    texts = _Texts()
    conversations = [texts.conversation(f"n{n:06}") for n in range(windows)]
    async with (
        SqliteStore(folder / "indexed.db", turns_kept=200) as indexed,
        SqliteStore(folder / "plain.db", turns_kept=200) as plain,
    ):
        for store in (indexed, plain):
            await _fill(store, conversations)
        before = (folder / "plain.db").stat().st_size
        seconds = await _index(indexed)
        await indexed.run_write(lambda db: db.run("SELECT 1"))
        keeping = asyncio.create_task(indexed.keep_searchable())
        with_index, without = await _record_both([indexed, plain], texts, turns)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        found = await _search_while_recording(indexed, texts, searches)
    size = (folder / "indexed.db").stat().st_size
    every = [one for times in found.values() for one in times]
    share = statistics.median(with_index) / statistics.median(without)
    mean_share = statistics.fmean(with_index) / statistics.fmean(without)
    lines = [
        f"{windows:,} windows, {windows * _MESSAGES:,} messages; {', '.join(describe().values())}",
        "",
        f"Indexing all of them took {seconds:.0f} s; the store grew from {before >> 20} to {size >> 20} MiB.",
        "",
        "| recording a turn | turns | median ms | p99 ms |", "|---|---|---|---|",
        _row("with the index", with_index), _row("without", without),
        "",
        f"With the index: {share - 1:+.1%} in the median, {mean_share - 1:+.1%} in the mean.",
        "",
        "| search, while turns are recorded | searches | median ms | p99 ms |", "|---|---|---|---|",
        *(_row(kind, times) for kind, times in found.items()), _row("**all**", every),
    ]  # fmt: skip
    ordered = sorted(every)
    good = statistics.median(every) < _LIMITS_MS[0] and ordered[int(len(ordered) * 0.99)] < _LIMITS_MS[1]
    return lines, good and share <= _LIMIT_SHARE


def main() -> None:
    """Measure, and print the table; exit code 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--searches", type=int, default=60, help="of each kind")
    parser.add_argument("--turns", type=int, default=400)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory(dir=".") as folder:
        lines, good = asyncio.run(_measure(Path(folder), options.windows, options.searches, options.turns))
    text = "\n".join(["# Search", "", *lines, ""])
    print(text)
    if options.out:
        options.out.write_text(text)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
