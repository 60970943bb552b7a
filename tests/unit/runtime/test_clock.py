"""A clock that jumps expires nothing that is not old."""

from pathlib import Path

import pytest

from gateway.runtime.clock import Clock
from gateway.store.sqlite import SqliteStore
from gateway.windows.retention import sweeper
from tests.support.harness import GatewayHarness, window

DAY = 86400.0


class Clocks:
    """Two clocks that a test controls."""

    def __init__(self, hold_s: float = 3600.0) -> None:
        self.wall = 1_800_000_000.0
        self.steady = 500.0
        self.clock = Clock(hold_s, lambda: self.wall, lambda: self.steady)

    def go_on(self, seconds: float) -> None:
        """Let time pass."""
        self.wall += seconds
        self.steady += seconds

    @property
    def doubt(self) -> str:
        """The doubt of the clock."""
        return self.clock.doubt()


def test_steady_clock_is_trusted() -> None:
    clocks = Clocks()
    for _ in range(1000):
        clocks.go_on(3600)
        clocks.wall += 30  # it is slewed, or drifts
        assert clocks.doubt == ""


@pytest.mark.parametrize("jump", [40 * DAY, -40 * DAY, 90.0])
def test_after_a_jump_nothing_expires_for_a_while(jump: float) -> None:
    clocks = Clocks()
    clocks.wall += jump
    for _ in range(50):
        assert "jumped" in clocks.doubt
        clocks.go_on(60)
    clocks.wall -= jump
    assert clocks.doubt == ""
    clocks.wall += jump
    assert "jumped" in clocks.doubt
    clocks.go_on(3599)
    assert "jumped" in clocks.doubt
    clocks.go_on(2)
    assert clocks.doubt == ""
    clocks.wall -= jump
    assert "jumped" in clocks.doubt


def test_clock_that_keeps_jumping_is_never_trusted() -> None:
    clocks = Clocks()
    for _ in range(100):
        clocks.wall += DAY
        clocks.go_on(600)
        assert "jumped" in clocks.doubt


def test_after_a_long_pause_nothing_expires_at_once() -> None:
    clocks = Clocks()
    clocks.clock.started_after(clocks.wall - 40 * DAY)
    assert "40 days" in clocks.doubt
    clocks.go_on(3601)
    assert clocks.doubt == ""
    for newest in (None, clocks.wall - 6 * DAY, clocks.wall + 40 * DAY):
        clocks.clock.started_after(newest)
        assert clocks.doubt == ""


@pytest.mark.anyio
async def test_sweep_without_expiry_leaves_expired_windows(harness: GatewayHarness) -> None:
    await window(harness.services, "w")
    await harness.services.store.describe_window("default", "w", {"expires_at": 1.0})
    await sweeper.sweep(harness.services, expire=False)
    assert await harness.services.store.window("default", "w")
    await sweeper.sweep(harness.services)
    assert await harness.services.store.window("default", "w") is None


@pytest.mark.anyio
async def test_newest_record_is_a_session_or_a_window(harness: GatewayHarness, tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "empty.db", turns_kept=5) as empty:
        assert await empty.newest() is None
    await window(harness.services, "w")
    assert await harness.services.store.newest() == 1.0
