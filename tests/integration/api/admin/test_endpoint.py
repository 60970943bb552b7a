"""What an admin route answers when its own code fails."""

import logging
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from starlette.types import Message

from gateway.api import in_process
from gateway.api.endpoint import Call, Endpoint
from gateway.api.operation import NDJSON, Handler, Operation

SECRET = "a path of ours"
INTERNAL = {
    "code": "internal", "message": "internal error; see the gateway's log", "hint": "", "retryable": False,
    "details": {},
}  # fmt: skip


async def failing(call: Call) -> Any:
    """Fail."""
    raise RuntimeError(SECRET)


async def no_json(call: Call) -> Any:
    """Answer with something that cannot be written as JSON, after some progress."""
    call.progress("work", 1, 2)
    return {"answer": Unwritable()}


class Unwritable:
    def __repr__(self) -> str:
        return SECRET


async def served(handler: Handler, accept: str) -> list[Any]:
    """The lines of the answer to one request."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = in_process.scope("GET", "/probe", b"", b"", [(b"accept", accept.encode())])
    names = ("services", "health", "autofreeze", "inference")
    scope["state"] = {name: SimpleNamespace() for name in names}
    await Endpoint(Operation("GET", "/probe", handler, dict, takes="", probe=True))(
        scope, in_process.nothing_more, send
    )
    assert not sent[-1].get("more_body")
    return [orjson.loads(line) for line in b"".join(message.get("body", b"") for message in sent).splitlines()]


@pytest.mark.anyio
@pytest.mark.parametrize("accept", ["application/json", NDJSON])
async def test_a_failure_is_a_short_message_with_details_in_the_log(
    accept: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        (line,) = await served(failing, accept)
    assert line["error"] == INTERNAL
    assert SECRET in caplog.text


@pytest.mark.anyio
@pytest.mark.parametrize("accept", ["application/json", NDJSON])
async def test_an_answer_that_is_no_json_is_a_failure_and_ends_the_stream(
    accept: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        *progress, last = await served(no_json, accept)
    assert last["error"] == INTERNAL
    assert [line["progress"]["stage"] for line in progress] == ([] if accept != NDJSON else ["work"])
    assert "Unwritable" in caplog.text
