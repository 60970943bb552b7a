"""What LMCache's message port does with HTTP, and that it is noticed."""

from pathlib import Path

import httpx
import pytest

from gateway.kv import message_port
from gateway.kv.lmcache import LMCache
from gateway.stack import commands, local
from gateway.stack.process import ManagedProcess
from tests.support import local_stack

pytestmark = [pytest.mark.stack, pytest.mark.anyio]


async def test_a_cache_that_reads_no_messages_any_more_is_not_called_healthy(tmp_path: Path) -> None:
    plan = local.plan(local.LocalStack(data_dir=tmp_path, demo="random"))
    process = ManagedProcess(commands.cache_launch(plan))
    process.start()
    try:
        local_stack.wait_ready(process, local_stack.CACHE_WITHIN)
        messages = f"http://127.0.0.1:{plan.cache_port}"
        async with LMCache(messages, 5.0, tmp_path) as wrong, LMCache(plan.cache_url, 5.0, tmp_path) as cache:
            assert "nothing was sent" in await wrong.trouble()
            assert await cache.trouble() == ""
            async with httpx.AsyncClient() as anybody:
                with pytest.raises(httpx.HTTPError):
                    await anybody.get(f"{messages}/{'x' * 500}", timeout=3)  # a short request is no whole message
            assert await cache.trouble() == message_port.ENDED
            assert (await cache._call("GET", "/healthcheck"))["status"] == "healthy", "so that alone tells nothing"
    finally:
        process.stop()
