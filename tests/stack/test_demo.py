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


def demo(url: str, *options: str) -> dict[str, Any]:
    """Run it, and insist that all of it held."""
    ended = cwg_process("demo", "--json", *options, url=url)
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert answer["problems"] == []
    for conversation in answer["conversations"]:
        assert conversation["identical"] == (conversation["tie_at_token"] is None)
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

        answer = demo(up.url, "--restart", "--data-dir", str(data_dir))
        assert answer["restarted"]
        short = answer["conversations"][0]
        assert "marmalade" in short["answer_live"]
        assert "marmalade" in short["answer"]
        assert up.said.count("engine is ready") == 2
    finally:
        up.end(signal.SIGTERM)
