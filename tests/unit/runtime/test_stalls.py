"""A process that was stalled does not blame engines or clients."""

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from gateway.engines.client import HttpEngineClient
from gateway.engines.connection_pool import Upstream, UpstreamError
from gateway.engines.node import EngineNode
from gateway.runtime.stalls import Stalls
from tests.support.fakes.engine import WITHIN, Exchange, FakeEngine
from tests.support.gateway_process import gateway_in_front_of

T = TypeVar("T")
TIMEOUT_S = 0.5
STILL_S = 1.2
SOON_S = 0.2


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The loop that the gateway runs on: its timers come before what arrived in the meantime is read."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
async def stalls() -> AsyncIterator[Stalls]:
    """The stall detector of this process."""
    async with Stalls() as stalls:
        yield stalls


class Late:
    """An engine that answers on command."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, exchange: Exchange) -> None:
        """Answer one request."""
        self.asked.set()
        assert self.go_on.wait(WITHIN)
        exchange.json({})

    async def answers_after_we_stood_still(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask, then block the event loop for longer than any timeout; the engine answers right after that."""
        asking = asyncio.ensure_future(ask())
        assert await asyncio.to_thread(self.asked.wait, WITHIN)
        threading.Timer(STILL_S + SOON_S, self.go_on.set).start()
        time.sleep(STILL_S)  # noqa: ASYNC251 - that is what is tested
        return await asking


def upstream_of(engine: FakeEngine, stalls: Stalls, timeout_s: float = TIMEOUT_S) -> Upstream:
    """An impatient client."""
    return Upstream(engine.url, connect_timeout_s=timeout_s, silence_timeout_s=timeout_s, lost_since=stalls.lost_since)


@pytest.mark.anyio
async def test_lost_time_is_counted_from_the_given_moment(stalls: Stalls) -> None:
    before = time.monotonic()
    time.sleep(STILL_S)  # noqa: ASYNC251 - that is what is tested
    after = time.monotonic()
    for _ in range(2):  # before its timer has noticed, and after that
        assert STILL_S - 0.3 < stalls.lost_since(before) < STILL_S + 0.5
        assert stalls.lost_since(before) - stalls.lost_since(before + 0.5) == pytest.approx(0.4, abs=0.15)
        assert stalls.lost_since(after) < 0.2
        await asyncio.sleep(0.15)


@pytest.mark.anyio
async def test_time_of_a_stall_is_not_the_engines_silence(engine: FakeEngine, stalls: Stalls) -> None:
    late = engine.on_other = Late()
    async with upstream_of(engine, stalls) as upstream:
        connection = await late.answers_after_we_stood_still(lambda: upstream.send("GET", b"/x", (), b""))
        assert connection.status == 200
        upstream.release_or_abort(connection)


@pytest.mark.anyio
async def test_connection_made_during_a_stall_is_used(engine: FakeEngine, stalls: Stalls) -> None:
    async with upstream_of(engine, stalls) as upstream:
        sending = asyncio.ensure_future(upstream.send("GET", b"/x", (), b""))
        await asyncio.sleep(0)
        time.sleep(STILL_S)  # noqa: ASYNC251 - that is what is tested
        upstream.release_or_abort(await sending)


@pytest.mark.anyio
async def test_silent_engine_is_detected_after_a_stall(engine: FakeEngine, stalls: Stalls) -> None:
    engine.on_other = lambda exchange: exchange.gone() and None
    async with upstream_of(engine, stalls) as upstream:
        sending = asyncio.ensure_future(upstream.send("GET", b"/x", (), b""))
        await asyncio.to_thread(engine.wait_seen, "/x")
        time.sleep(STILL_S)  # noqa: ASYNC251 - that is what is tested
        with pytest.raises(UpstreamError, match="silent"):
            await sending


@pytest.mark.anyio
async def test_probe_during_a_stall_does_not_count(engine: FakeEngine, stalls: Stalls) -> None:
    late = engine.on_health = Late()
    lost = stalls.lost_since
    asks = HttpEngineClient(
        engine.url, api_key="", fingerprint="", connect_timeout_s=TIMEOUT_S, timeout_s=TIMEOUT_S, lost_since=lost
    )
    member = EngineNode(upstream_of(engine, stalls), asks, lost)
    await late.answers_after_we_stood_still(member.probe)
    assert (member.state, member.report()["failures"]) == ("healthy", 0)
    await member.close()


def test_stopped_gateway_does_not_blame_its_engine(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    settings = {"connect_timeout_s": TIMEOUT_S, "engine_timeout_s": TIMEOUT_S, "engine_check_s": 0.1}
    with gateway_in_front_of(engine.url, tmp_path, **settings) as gateway:
        for _ in range(3):
            late = engine.on_health = Late()
            assert late.asked.wait(WITHIN)
            gateway.process.send_signal(signal.SIGSTOP)
            time.sleep(STILL_S)
            gateway.process.send_signal(signal.SIGCONT)
            threading.Timer(SOON_S, late.go_on.set).start()
            assert gateway.chat(session).status_code == 200
            assert gateway.http.get("/readyz").status_code == 200
        assert "did not answer" not in gateway.http.get("/admin/health").text
        assert "ejected" not in gateway.log
