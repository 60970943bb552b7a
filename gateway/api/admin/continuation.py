"""Continue a thawed session at once: the prompt is sent as its next turn through the inference API."""

from typing import Any

import orjson

from gateway.api import in_process
from gateway.api.admin import models
from gateway.api.endpoint import Call
from gateway.errors import GatewayError
from gateway.records import Session
from gateway.windows import ask
from gateway.windows.catalog import get_usable_window


async def check(call: Call, prompt: str | None, max_tokens: int | None) -> None:
    """Refuse what could not be gone on with, before anything is thawed.

    Raises `invalid_request`, `window_not_found`.
    """
    if prompt is not None:
        await ask.conversation(call.services, await get_usable_window(call.services, call.tenant, call.window_name))
    elif max_tokens is not None:
        raise GatewayError(
            "invalid_request",
            "max_tokens bounds the answer to continuation_prompt, which is not given",
            hint="give both, or neither",
            details={"field": "max_tokens"},
        )


async def go_on(call: Call, session: Session, prompt: str, max_tokens: int | None) -> models.Continuation:
    """Send the prompt; return the answer, as a part of the thaw's result.

    A turn that fails does not undo the thaw: `error` says why, in place of the message.
    """
    call.progress("answer", 0, 0)
    history = await call.services.store.messages(session.transcript) if session.transcript else []
    asked = {
        "model": session.model,
        "messages": ask.following(history, prompt),
        "max_tokens": max_tokens or ask.USUAL_TOKENS,
    }
    path = f"/s/{session.id}/v1/chat/completions"
    headers = [*call.keys, (b"content-type", b"application/json")]
    status, raw = await in_process.call_app(call.inference, path, orjson.dumps(asked), headers)
    await call.services.recorder.flush()  # whoever has this answer finds it in the transcript
    answer = orjson.loads(raw)
    return _failed(answer) if status >= 400 else _said(answer)


def _said(answer: dict[str, Any]) -> models.Continuation:
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    return models.Continuation(
        message=choice["message"],
        finish_reason=choice.get("finish_reason"),
        usage=usage,
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        error=None,
    )


def _failed(answer: dict[str, Any]) -> models.Continuation:
    return models.Continuation(message=None, finish_reason=None, usage=None, cached_tokens=None, error=answer["error"])
