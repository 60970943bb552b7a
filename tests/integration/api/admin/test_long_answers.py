"""Long answers are built off the event loop, so that probes on other connections are answered meanwhile."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from gateway.api.admin.models import requests
from gateway.api.admin.routes import window_status
from gateway.api.admin.windows import show_tree
from gateway.api.requests import read_query
from tests.support.harness import CHUNKS, GatewayHarness, window

pytestmark = pytest.mark.anyio

T = TypeVar("T")


class Recorder(ThreadPoolExecutor):
    """The loop's threads, and what was made in them."""

    def __init__(self) -> None:
        super().__init__(max_workers=2)
        self.done: list[Future[Any]] = []

    def submit(self, work: Callable[..., T], /, *args: Any, **named: Any) -> Future[T]:
        self.done.append(super().submit(work, *args, **named))
        return self.done[-1]

    def made(self, value: object) -> bool:
        return any(one.result() is value for one in self.done if one.done() and one.exception() is None)


@pytest.fixture
async def threads() -> Recorder:
    recorder = Recorder()
    asyncio.get_running_loop().set_default_executor(recorder)
    return recorder


@pytest.fixture
async def call(harness: GatewayHarness) -> SimpleNamespace:
    """As much of a request as these operations read."""
    await window(harness.services)
    return SimpleNamespace(services=harness.services, tenant="default", window_name="w", now=1.0)


async def test_blocks_are_built_in_a_thread(call: SimpleNamespace, threads: Recorder) -> None:
    answer = await window_status.handler(call, query=read_query(requests.StatusQuery, {"include_blocks": "true"}))
    assert len(answer["blocks"]) == CHUNKS
    assert threads.made(answer["blocks"])


async def test_tree_is_built_in_a_thread(call: SimpleNamespace, threads: Recorder) -> None:
    answer = await show_tree.handler(call, query=requests.TreeQuery())
    assert [node["name"] for node in answer["nodes"]] == ["w"]
    assert threads.made(answer["nodes"])
