"""`cwg demo` on the real stack, and the demo model that talks: it still knows after a restart what it was told."""

import json
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.stack.driver import Gateway, converse
from tests.support.cli import cwg_process
from tests.support.up_process import Up

pytestmark = pytest.mark.stack

FACT = "The secret word for the launch is marmalade. Please remember it."  # as in the README
QUESTION = "What is the secret word for the launch?"


def demo(url: str, *options: str) -> dict[str, Any]:
    """Run it, and insist that all of it held."""
    ended = cwg_process("demo", "--json", *options, url=url)
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert (answer["identical"], answer["problems"]) == (True, [])
    for conversation in answer["conversations"]:
        frozen = conversation["freeze_receipt"]
        assert conversation["cached_tokens"] >= frozen["chunks"] * frozen["chunk_size"] > 0
        assert conversation["recomputed_cached_tokens"] == 0
    assert 3_500 < answer["conversations"][1]["prompt_tokens"] < 5_000
    left = httpx.get(f"{url}/admin/tree").json()["nodes"]
    assert not [node["name"] for node in left if node["name"].startswith("demo-")]
    return dict(answer)


def test_the_demo_holds_beside_other_traffic(shared: Gateway) -> None:
    client = shared.client("beside")
    other = threading.Thread(target=lambda: converse(client, "the weather", turns=6))
    other.start()
    assert not demo(shared.url)["restarted"]
    other.join()


def test_a_fact_is_known_after_a_restart(smollm2_folder: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    shutil.copytree(smollm2_folder, data_dir / "models" / smollm2_folder.name)
    up = Up(data_dir, "smollm2")
    try:
        up.wait_ready()
        assert "model demo: SmolLM2-135M-Instruct, Apache-2.0" in up.said
        talk = [{"role": "user", "content": FACT}]
        talk += [{"role": "assistant", "content": say(up, "alice", talk)}]
        frozen = httpx.post(f"{up.url}/admin/windows", json={"session_id": "alice", "window_name": "w"}, timeout=60)
        assert frozen.status_code == 201, frozen.text

        assert "marmalade" in say(up, "alice", [*talk, {"role": "user", "content": QUESTION}])

        answer = demo(up.url, "--restart", "--data-dir", str(data_dir))
        assert answer["restarted"]
        assert "marmalade" in answer["conversations"][0]["answer"]
        assert up.said.count("engine is ready") == 2

        thawed = httpx.post(f"{up.url}/admin/windows/w/thaw", json={"new_session_id": "bob"}, timeout=60)
        assert thawed.status_code == 200, thawed.text
        assert "marmalade" in say(up, "bob", [{"role": "user", "content": QUESTION}])
    finally:
        up.end(signal.SIGTERM)


def say(up: Up, session: str, messages: list[dict[str, str]]) -> str:
    """The model's greedy answer."""
    body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 40}
    answer = httpx.post(f"{up.url}/s/{session}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])
