"""Two gateways on one PostgreSQL: conversations whose every turn goes to the other gateway, at once after the reply.

    python -m loadtests.alternate_gateways [--turns 1000] [--conversations 1] [--one]

Counts forks, which must be none, and prints how long a turn took; `--one` sends all to one gateway, to compare.
"""

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path

import httpx

from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.fleet import two_gateways
from tests.support.postgres import PostgresServer

_LENGTH = 25  # turns of a conversation before the next one begins


class Talk:
    """What one client saw."""

    def __init__(self, urls: list[str], turns: int, name: str) -> None:
        self.took: list[float] = []
        self.forks = 0
        self._clients = [httpx.Client(base_url=url, timeout=60) for url in urls]
        self._turns = turns
        self._name = name

    def run(self) -> None:
        """Talk, conversation after conversation."""
        for start in range(0, self._turns, _LENGTH):
            self._converse(f"{self._name} conversation {start}", min(_LENGTH, self._turns - start))

    def _converse(self, opening: str, turns: int) -> None:
        messages: list[object] = []
        session = ""
        for number in range(turns):
            messages.append({"role": "user", "content": f"{opening}, turn {number}"})
            client, clock = self._clients[number % len(self._clients)], time.monotonic()
            answer = client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
            self.took.append(time.monotonic() - clock)
            answer.raise_for_status()
            messages.append(answer.json()["choices"][0]["message"])
            self.forks += bool(session) and answer.headers["x-session-id"] != session
            session = session or answer.headers["x-session-id"]


def _measure(urls: list[str], turns: int, conversations: int) -> tuple[list[float], int, float]:
    talks = [Talk(urls, turns // conversations, f"client {number}") for number in range(conversations)]
    threads = [threading.Thread(target=talk.run) for talk in talks]
    clock = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = [one for talk in talks for one in talk.took]
    return took, sum(talk.forks for talk in talks), time.monotonic() - clock


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--conversations", type=int, default=1)
    parser.add_argument("--one", action="store_true")
    given = parser.parse_args()
    engine = FakeEngine().start()
    with (
        tempfile.TemporaryDirectory() as folder,
        PostgresServer() as server,
        two_gateways(Path(folder), engine, server.new_database()) as pair,
    ):
        urls = [gateway.url for gateway in pair][: 1 if given.one else 2]
        took, forks, wall_s = _measure(urls, given.turns, given.conversations)
    engine.stop()
    ms = statistics.quantiles([1000 * one for one in took], n=100)
    print(f"{len(took)} turns in {wall_s:.1f} s, {forks} forks")
    print(f"ms per turn: p50 {ms[49]:.1f}, p90 {ms[89]:.1f}, p99 {ms[98]:.1f}")


if __name__ == "__main__":
    main()
