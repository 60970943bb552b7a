"""Convert chat messages to the Messages API, so that the engine renders the same prompt from them.

`gateway.dialects.messages_to_chat` is the way back. Whatever would come back different raises `invalid_request`: a
prompt that differs is another conversation, and its KV is not found.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gateway.dialects.messages_to_chat import converted, tool_changes
from gateway.dialects.prompt_filters import BILLING_HEADER
from gateway.errors import GatewayError
from gateway.records import Front, Message
from gateway.validation.shown import shown

# Every other field of a message either never reaches a prompt, or cannot be expressed.
_FIELDS = {
    "system": frozenset({"role", "content"}),
    "user": frozenset({"role", "content"}),
    "assistant": frozenset({"role", "content", "tool_calls", "reasoning", "reasoning_content"}),
    "tool": frozenset({"role", "content", "tool_call_id"}),
}
_NOT_IN_PROMPT = frozenset({"refusal", "annotations", "audio", "function_call"})
_FUNCTION = frozenset({"name", "description", "parameters", "strict", "defer_loading"})
_FRAME_FIELDS = frozenset({"tools", "chat_template_kwargs"})
_EFFORTS = frozenset({"low", "medium", "high", "xhigh", "max"})  # vllm 0.32, anthropic/protocol.py


def in_front(front: Front, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request body with `front` in front of its own messages. Raises `invalid_request`."""
    sent = body["messages"]
    count = next((i for i, message in enumerate(sent) if not _is_system(message)), len(sent))
    leading, rest = sent[:count], sent[count:]
    whole = dict(body)
    if front.system is not None:
        systems = messages(front.system)
        whole.pop("system", None)
        if systems:
            whole["system"] = systems.pop(0)["content"]
        # Replacing the text of the client's system messages does not undo the changes to tools that they make.
        changed = [{"role": "system", "content": changes} for m in leading if (changes := tool_changes(m))]
        leading = [*systems, *changed]
    whole["messages"] = [*leading, *messages(front.history), *rest]
    frame = dict(front.frame)
    return whole | _thinking(frame.pop("reasoning_effort", None), body) | _fields(frame)


def messages(sent: Sequence[Message]) -> list[dict[str, Any]]:
    """Return canonical messages as messages of the Messages API. Raises `invalid_request`."""
    made: list[dict[str, Any]] = []
    for message in sent:
        role = message.get("role")
        if role not in _FIELDS:
            raise _inexpressible(f"a message of role {shown(role, 40)}")
        for name in message.keys() - _FIELDS[role] - _NOT_IN_PROMPT:
            if message[name] not in (None, "", [], {}):
                raise _inexpressible(f"{shown(name, 40)} of a message of role {role}")
        _ROLES[role](message, made)
    return made


def _is_system(message: Mapping[str, Any]) -> bool:
    """Whether the engine makes only system messages of a message, or nothing at all."""
    return all(one["role"] == "system" for one in converted(message))


def _system(message: Message, made: list[dict[str, Any]]) -> None:
    text = _plain(message.get("content"), "a system message")
    if not text:
        raise _inexpressible("a system message that is empty")
    if text.startswith(BILLING_HEADER):
        raise _inexpressible("a system message that begins as a billing header")
    made.append({"role": "system", "content": text})


def _user(message: Message, made: list[dict[str, Any]]) -> None:
    content = message.get("content")
    if isinstance(content, list) and content and not _is_plain(content):
        made.append({"role": "user", "content": [_part(part) for part in content]})
    else:
        made.append({"role": "user", "content": _plain(content, "a user's message")})


def _assistant(message: Message, made: list[dict[str, Any]]) -> None:
    content, calls = message.get("content"), message.get("tool_calls") or []
    blocks: list[dict[str, Any]] = []
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    if reasoning:
        blocks.append({"type": "thinking", "thinking": reasoning, "signature": ""})
    if isinstance(content, list) and not _is_plain(content):
        blocks += [_part(part) for part in content]
    elif text := _plain(content, "an assistant's message"):
        blocks.append({"type": "text", "text": text})
    blocks += [_tool_use(call) for call in calls]
    made.append({"role": "assistant", "content": blocks})


def _tool(message: Message, made: list[dict[str, Any]]) -> None:
    """A tool's result; consecutive results are one message, as clients of this API send them."""
    call_id, content = message.get("tool_call_id") or "", message.get("content")
    results = made[-1]["content"] if made and _has_results(made[-1]) else []
    if not results:
        made.append({"role": "user", "content": results})
    if isinstance(content, list) and any(_kind(part) == "tool_reference" for part in content):
        _add_references(results, call_id, content)
        return
    if isinstance(content, list):
        content = "\n".join(_part_text(part, "a tool's result") for part in content)
    results.append({"type": "tool_result", "tool_use_id": call_id, "content": _plain(content, "a tool's result")})


def _add_references(results: list[dict[str, Any]], call_id: str, content: list[Any]) -> None:
    """Add references to tools to the preceding result, which is of the same call if it came by the Messages API."""
    names = [part.get("name") for part in content if isinstance(part, dict)]
    before = results[-1] if results else {}
    if before.get("tool_use_id") != call_id or not isinstance(before.get("content"), str):
        raise _inexpressible("a tool's result that names tools and has no text before it")
    before["content"] = [{"type": "text", "text": before["content"]}]
    before["content"] += [{"type": "tool_reference", "tool_name": name} for name in names]


def _has_results(message: Mapping[str, Any]) -> bool:
    content = message["content"]
    return message["role"] == "user" and isinstance(content, list) and _kind(content[-1]) == "tool_result"


_ROLES: dict[str, Callable[[Message, list[dict[str, Any]]], None]] = {
    "system": _system,
    "user": _user,
    "assistant": _assistant,
    "tool": _tool,
}


def _part(part: Any) -> dict[str, Any]:
    image = part.get("image_url") if _kind(part) == "image_url" else None
    if isinstance(image, dict) and isinstance(image.get("url"), str):
        return {"type": "image", "source": {"type": "url", "url": image["url"]}}
    text = _part_text(part, "a message")
    if not text:
        raise _inexpressible("a part that is an empty text")
    return {"type": "text", "text": text}


def _part_text(part: Any, where: str) -> str:
    if _kind(part) != "text" or not isinstance(part.get("text"), str):
        raise _inexpressible(f"a part of type {shown(_kind(part), 40)} in {where}")
    text: str = part["text"]
    return text


def _kind(part: Any) -> object:
    return part.get("type") if isinstance(part, dict) else type(part).__name__


def _is_plain(content: list[Any]) -> bool:
    return len(content) == 1 and _kind(content[0]) == "text"


def _plain(content: Any, where: str) -> str:
    if content is None or content == []:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and len(content) == 1:
        return _part_text(content[0], where)
    raise _inexpressible(f"{where} in several parts")


def _tool_use(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not call.get("id"):
        raise _inexpressible("a tool call that has no id, or no function")
    return {"type": "tool_use", "id": call["id"], "name": function.get("name") or "", "input": _input(function)}


def _input(function: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as an object; the engine reads anything else as an empty one, in either API."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, nested too deep
            return {}
    return arguments if isinstance(arguments, dict) else {}


def _thinking(effort: object, body: Mapping[str, Any]) -> dict[str, Any]:
    """The reasoning effort of the window's replies, if the client does not set its own."""
    if effort is None or "thinking" in body:
        return {}
    if effort == "none":
        return {"thinking": {"type": "disabled"}}
    if effort not in _EFFORTS:
        raise _inexpressible(f"the window's reasoning_effort {shown(effort, 40)}")
    return {"output_config": {**(body.get("output_config") or {}), "effort": effort}}


def _fields(frame: Mapping[str, Any]) -> dict[str, Any]:
    for name in frame.keys() - _FRAME_FIELDS:
        if frame[name]:
            raise _inexpressible(f"{shown(name, 40)} of the window")
    fields = {name: frame[name] for name in _FRAME_FIELDS if frame.get(name)}
    if "tools" in fields:
        fields["tools"] = [_declared(tool) for tool in fields["tools"]]
    return fields


def _declared(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    schema = function.get("parameters") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(schema, dict) or "type" not in schema:
        raise _inexpressible("a tool of the window whose parameters are not a schema with a type", _OWN_TOOLS)
    if tool.get("defer_loading") is not None:
        raise _inexpressible("'defer_loading' next to a tool's function", _OWN_TOOLS)
    declared = {name: value for name, value in function.items() if name in _FUNCTION and value is not None}
    declared["input_schema"] = declared.pop("parameters")
    return declared


_OTHER_API = "continue it through /v1/chat/completions"
_OWN_TOOLS = f"send `tools` with the request, or {_OTHER_API}"


def _inexpressible(what: str, hint: str = _OTHER_API) -> GatewayError:
    return GatewayError("invalid_request", f"the Messages API cannot express {what}", hint=hint)
