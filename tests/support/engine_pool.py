"""Several engines, and who of them was asked."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from gateway.engines.client import HttpEngineClient
from gateway.engines.connection_pool import Upstream
from gateway.engines.node import EngineNode
from gateway.engines.pool import EnginePool
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import Gateway, eventually

CHAT = "/v1/chat/completions"


Before = Callable[..., Gateway]


def chats(engines: Sequence[FakeEngine]) -> list[int]:
    """How many chat completions each engine has seen."""
    return [len(engine.seen(CHAT)) for engine in engines]


def server_of(gateway: Gateway, session: str, count: int = 1) -> str:
    """The engine that served a session's last turn, by its own record."""
    return str(gateway.turns(session, count)[0]["engine"])


def shown(gateway: Gateway) -> dict[str, dict[str, Any]]:
    """What health shows of each engine."""
    component = gateway.http.get("/admin/health?component=engine").json()["components"]["engine"]
    return {one["url"]: one for one in component["engines"]}


def all_healthy(gateway: Gateway) -> None:
    """Wait until every engine has been looked at."""
    eventually(lambda: all(one["state"] == "healthy" for one in shown(gateway).values()), "all are healthy")


@asynccontextmanager
async def members(*urls: str) -> AsyncIterator[EnginePool]:
    """Engines that only the test uses."""
    made = [
        EngineNode(
            Upstream(url, connect_timeout_s=1, silence_timeout_s=1),
            HttpEngineClient(url, api_key="", fingerprint="", connect_timeout_s=1, timeout_s=1),
        )
        for url in urls
    ]
    yield EnginePool(made, 5)
    for member in made:
        await member.close()
