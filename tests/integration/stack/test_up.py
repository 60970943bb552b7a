"""`cwg up` as a user runs it: one command, the whole real stack, and every way for it to end."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.up_process import START_S, Up, eventually, living, shared_memory

pytestmark = pytest.mark.stack

CHUNK = 64
HISTORY = [
    {"role": "system", "content": "You keep a lighthouse."},
    {"role": "user", "content": "Tell me what you wrote into the books. " * 60},
]


def ask(up: Up, question: str) -> dict[str, Any]:
    """A turn of one session; the answer's usage."""
    body = {"model": "demo", "max_tokens": 8, "messages": [*HISTORY, {"role": "user", "content": question}]}
    answer = httpx.post(f"{up.url}/s/keeper/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["usage"])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """`cwg up` on the test's data directory, any number of times, with more arguments."""
    runs: list[Up] = []

    def run(*more: str) -> Up:
        runs.append(Up(tmp_path / "data", "random", *more))
        return runs[-1]

    yield run
    for up in runs:
        if up.process.poll() is None:
            up.end(signal.SIGTERM)


def test_up_serves_restarts_processes_and_stops_clean(start: Callable[..., Up], tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text("auto_freeze_idle_minutes = 77\n")
    up = start("--config", str(config), "--", "--max-num-seqs", "7")
    up.wait_ready()
    assert "'max_num_seqs': 7" in (tmp_path / "data" / "logs" / "engine.log").read_text()
    assert httpx.get(f"{up.url}/admin/policies").json()["idle_timeout_minutes"] == 77
    prompt_tokens = ask(up, "What did you see?")["prompt_tokens"]
    kv = tmp_path / "data" / "kv"
    eventually(
        lambda: len(list(kv.glob("models-SEP-demo-small@*.data"))) >= prompt_tokens // CHUNK, "the KV is on disk", 30
    )

    second = start()
    assert second.close() == 1
    assert second.said.endswith(f"is in use by process {up.process.pid}; stop that one or pass another --data-dir\n")

    up.kill("cache")
    ask(up, "And then?")
    up.kill("engine")
    assert ask(up, "What did you see?")["prompt_tokens_details"]["cached_tokens"] >= prompt_tokens - CHUNK
    up.kill("gateway")
    ask(up, "Anything else?")

    processes, segments = up.belongings()
    assert segments
    assert up.end(signal.SIGTERM) == 0
    assert not living(processes)
    assert not shared_memory() & segments
    assert not list(up.run_dir.iterdir())

    again = start()
    again.wait_ready()
    assert ask(again, "What did you see?")["prompt_tokens_details"]["cached_tokens"] >= prompt_tokens - CHUNK

    processes, segments = again.belongings()
    again.end(signal.SIGKILL)
    eventually(lambda: not living(processes), "no orphan is left", 30)
    eventually(lambda: not shared_memory() & segments, "no segment is left", 30)


def test_what_vllm_refuses_is_shown_and_not_retried(start: Callable[..., Up]) -> None:
    up = start("--", "--dtipe", "half")
    eventually(lambda: up.process.poll() is not None, "it has ended", START_S)
    assert up.close() == 1
    assert "engine ended with exit code 2; log: " in up.said
    assert "error: unrecognized arguments: --dtipe" in up.said
    assert up.said.endswith("error: engine refused its options; see above\n")
