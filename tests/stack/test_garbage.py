"""After deleting everything, disk and Redis are as before the first turn: on the real engine and the real cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack.conftest import Stack
from tests.stack.drive import Gateway, chat, converse, until

pytestmark = pytest.mark.stack

QUESTION = {"role": "user", "content": "And then?"}


@pytest.fixture
def sweeping(stack: Stack, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway of the test's own that looks for garbage all the time."""
    settings = stack.settings(tmp_path / "data", CWG_SWEEP_EVERY_S="0.5")
    gateway = Gateway(settings, tmp_path / "gateway.log").start()
    yield gateway
    gateway.close()


def _stored(stack: Stack) -> tuple[set[Path], set[bytes]]:
    """Every object and pin on disk, and every key in Redis."""
    places = (stack.kv_dir, stack.plan.data_dir / "kv-pins")
    files = {file for place in places for file in place.rglob("*") if file.is_file()}
    return files, set(stack.redis.scan_iter("*", count=10**5))


def test_after_deleting_everything_disk_and_redis_are_as_before_the_first_turn(stack: Stack, sweeping: Gateway) -> None:
    before = _stored(stack)
    messages = converse(sweeping.client("one"), "garbage one")
    converse(sweeping.client("two"), "garbage two", turns=1)
    sweeping.freeze("one", "window")
    chat(sweeping.client("one"), [*messages, QUESTION])
    thawed = sweeping.thaw("window", warm="gpu")["session_id"]
    chat(sweeping.client(thawed), [QUESTION])
    assert sweeping.http.post("/admin/windows/window/clone", json={"target_window": "copy"}).status_code == 201
    files, names = _stored(stack)
    assert len(files - before[0]) > 10
    assert len(names - before[1]) > 10
    sessions = [one["id"] for one in sweeping.http.get("/admin/sessions").json()["sessions"]]
    assert {"one", "two", thawed} <= set(sessions)
    freed = 0
    for path in ("windows/window", *(f"sessions/{one}" for one in sessions), "windows/copy"):
        answer = sweeping.http.delete(f"/admin/{path}")
        assert answer.status_code == 200, answer.text
        freed += answer.json()["space_freed_bytes"]
    assert freed > 0
    until(lambda: _stored(stack) == before, "disk and Redis are as before")
