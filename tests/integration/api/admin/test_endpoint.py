"""What an admin route answers when its own code fails."""

import logging
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from starlette.types import Message

from gateway.api import in_process
from gateway.api.endpoint import Call, Endpoint
from gateway.api.operation import NDJSON, Operation

SECRET = "a path of ours"


async def failing(call: Call) -> Any:
    """Fail."""
    raise RuntimeError(SECRET)


@pytest.mark.anyio
@pytest.mark.parametrize("accept", ["application/json", NDJSON])
async def test_a_failure_is_a_short_message_with_details_in_the_log(
    accept: str, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = in_process.scope("GET", "/probe", b"", b"", [(b"accept", accept.encode())])
    names = ("services", "health", "autofreeze", "inference")
    scope["state"] = {name: SimpleNamespace() for name in names}
    with caplog.at_level(logging.ERROR):
        await Endpoint(Operation("GET", "/probe", failing, dict, takes="", probe=True))(
            scope, in_process.nothing_more, send
        )
    body = b"".join(message.get("body", b"") for message in sent)
    assert orjson.loads(body)["error"] == {
        "code": "internal", "message": "internal error; see the gateway's log", "hint": "", "retryable": False,
        "details": {},
    }  # fmt: skip
    assert SECRET in caplog.text
