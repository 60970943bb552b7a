"""Continue a thawed session at once: send a prompt as its next turn through the inference API."""

import orjson

from gateway.api import in_process
from gateway.api.admin.models import responses
from gateway.api.endpoint import Call
from gateway.errors import GatewayError
from gateway.records import Session
from gateway.windows import ask
from gateway.windows.catalog import get_usable_window


async def check(call: Call, prompt: str | None, max_tokens: int | None) -> None:
    """Refuse a window that cannot be continued, before it is thawed. Raises `invalid_request`, `window_not_found`."""
    if prompt is not None:
        await ask.conversation(call.services, await get_usable_window(call.services, call.tenant, call.window_name))
    elif max_tokens is not None:
        raise GatewayError(
            "invalid_request",
            "max_tokens bounds the answer to continuation_prompt, which is not given",
            hint="give both, or neither",
            details={"field": "max_tokens"},
        )


async def send_prompt(call: Call, session: Session, prompt: str, max_tokens: int | None) -> responses.Continuation:
    """Send the prompt and return the answer. A turn that fails does not undo the thaw: its error is returned."""
    call.progress("answer", 0, 0)
    history = await call.services.store.messages(session.transcript) if session.transcript else []
    body = {
        "model": session.model,
        "messages": ask.following(history, prompt),
        "max_tokens": max_tokens or ask.DEFAULT_TOKENS,
    }
    path = f"/s/{session.id}/v1/chat/completions"
    headers = [*call.keys, (b"content-type", b"application/json")]
    status, raw = await in_process.call_app(call.inference, path, orjson.dumps(body), headers)
    await call.services.recorder.flush()  # whoever has this answer finds it in the transcript
    answer = orjson.loads(raw)
    if status >= 400:
        error = answer["error"]
        return responses.Continuation(message=None, finish_reason=None, usage=None, cached_tokens=None, error=error)
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    return responses.Continuation(
        message=choice["message"],
        finish_reason=choice.get("finish_reason"),
        usage=usage,
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        error=None,
    )
