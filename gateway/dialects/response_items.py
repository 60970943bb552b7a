"""Convert items of the Responses API to canonical chat messages and back.

`read` joins items into the chat messages from which vLLM (0.32, openai/responses) renders the prompt: the parts of one
assistant message (reasoning, text, tool calls) are several items. `write` makes items of messages that read back as the
same. Tools differ too: `chat_tools`, `response_tools`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gateway.dialects import transcripts
from gateway.errors import GatewayError
from gateway.records import Message

Item = dict[str, Any]

# Tuples, not sets: a client may send anything in these places, and not everything has a hash.
_PLAIN_ROLES = ("user", "system", "developer")
_CALLS = ("function_call", "custom_tool_call")
_OUTPUTS = ("function_call_output", "custom_tool_call_output")
_TEXTS = ("input_text", "output_text", "text")
_UNFINISHED = ("in_progress", "incomplete")
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict", "defer_loading")
# The model sees a tool whose input is plain text as a function with one argument.
_CUSTOM_INPUT = "input"
_CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {_CUSTOM_INPUT: {"type": "string", "description": "The freeform text payload for this tool."}},
    "required": [_CUSTOM_INPUT],
    "additionalProperties": False,
}


class _Inexpressible(Exception):
    """An item or a message that the other API cannot express."""


# --- items to messages


def read(items: Iterable[object]) -> list[Message] | None:
    """Return items as the chat messages that the model sees; None if one of them cannot be expressed as such."""
    messages: list[Message] = []
    try:
        for item in items:
            if not isinstance(item, dict):
                return None
            _add(messages, item)
    except _Inexpressible:
        return None
    return messages


def continues_reply(items: Sequence[object]) -> bool:
    """Whether the model is to continue the last item; as a message it would be a reply before the reply."""
    last = items[-1] if items else None
    if not isinstance(last, dict) or last.get("type", "message") not in ("message", "reasoning"):
        return False
    return last.get("status") in _UNFINISHED


def _add(messages: list[Message], item: Item) -> None:
    kind = item.get("type", "message")
    if kind in _CALLS:
        before = messages[-1] if messages and messages[-1].get("role") == "assistant" else None
        if before is None:
            before = {"role": "assistant"}
            messages.append(before)
        before.setdefault("tool_calls", []).append(_call(item))
    elif kind in _OUTPUTS:
        result = {"role": "tool", "content": _content(item.get("output")), "tool_call_id": _text(item, "call_id")}
        messages.append(result)
    elif kind == "reasoning":
        _join(messages, "reasoning", _reasoning(item))
    elif kind == "message" and item.get("role") == "assistant":
        _join(messages, "content", _reply_text(item.get("content")))
    elif kind == "message" and item.get("role") in _PLAIN_ROLES:
        messages.append({"role": item["role"], "content": _content(item.get("content"))})
    else:
        raise _Inexpressible


def _join(messages: list[Message], name: str, text: str) -> None:
    """Add to the preceding assistant message, or begin a new one if that has such a part already."""
    if messages and messages[-1].get("role") == "assistant" and messages[-1].get(name) is None:
        messages[-1][name] = text
    else:
        messages.append({"role": "assistant", name: text})


def _call(item: Item) -> dict[str, Any]:
    name = _text(item, "name")
    if item["type"] == "custom_tool_call":
        arguments = json.dumps({_CUSTOM_INPUT: item.get("input") or ""}, ensure_ascii=False)
    else:
        arguments = _text(item, "arguments")
        name = f"{item['namespace']}__{name}" if item.get("namespace") else name
    return {"id": _text(item, "call_id"), "type": "function", "function": {"name": name, "arguments": arguments}}


def _reasoning(item: Item) -> str:
    if item.get("encrypted_content"):
        raise _Inexpressible
    for parts in (item.get("content"), item.get("summary")):
        if isinstance(parts, list) and parts:
            return _text(parts[0], "text")
    return ""


def _reply_text(content: object) -> str:
    """The text of an assistant's message: the engine reads the first of several parts."""
    if isinstance(content, list):
        return _text(content[0], "text") if content else ""
    if isinstance(content, str):
        return content
    raise _Inexpressible


def _content(content: object) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return [_part(part) for part in content]
    raise _Inexpressible


def _part(part: object) -> dict[str, Any]:
    if isinstance(part, dict) and part.get("type") in _TEXTS:
        return {"type": "text", "text": _text(part, "text")}
    if isinstance(part, dict) and part.get("type") == "input_image":
        image = {"url": _text(part, "image_url")}
        return {"type": "image_url", "image_url": image | _present(part, ("detail",))}
    raise _Inexpressible


def _text(part: object, name: str) -> str:
    value = part.get(name) if isinstance(part, dict) else None
    if not isinstance(value, str):
        raise _Inexpressible
    return value


# --- messages to items


def write(messages: Sequence[Message]) -> list[Item]:
    """Return messages as items. Raises `invalid_request` if they would not read back as the same messages."""
    items: list[Item] = []
    for number, message in enumerate(messages):
        try:
            items += _items(message)
        except _Inexpressible as error:
            raise _refused(number) from error
    again = read(items) or []
    shared = transcripts.common(messages, again)
    if shared < max(len(messages), len(again)):
        raise _refused(shared)
    return items


def _refused(number: int) -> GatewayError:
    return GatewayError(
        "invalid_request",
        f"message {number} of the conversation cannot be expressed in the Responses API",
        hint="continue it at /v1/chat/completions",
    )


def _items(message: Message) -> list[Item]:
    role = message.get("role")
    if role in _PLAIN_ROLES:
        return [{"type": "message", "role": role, "content": _client_content(message.get("content"))}]
    if role == "tool":
        call_id, output = _text(message, "tool_call_id"), _client_content(message.get("content"))
        return [{"type": "function_call_output", "call_id": call_id, "output": output}]
    if role != "assistant":
        raise _Inexpressible
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    calls = message.get("tool_calls") or []
    items: list[Item] = [] if not reasoning else [_reasoning_item(reasoning)]
    if message.get("content") or not (reasoning or calls):
        items.append(_reply_item(message.get("content") or ""))
    return items + [_call_item(call) for call in calls]


def _reasoning_item(text: str) -> Item:
    return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def _reply_item(content: object) -> Item:
    if isinstance(content, list):
        if len(content) != 1:
            raise _Inexpressible
        content = _text(content[0], "text")
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": content}]}


def _call_item(call: object) -> Item:
    function = call.get("function") if isinstance(call, dict) else None
    name, arguments = _text(function, "name"), _text(function, "arguments")
    return {"type": "function_call", "call_id": _text(call, "id"), "name": name, "arguments": arguments}


def _client_content(content: object) -> str | list[dict[str, Any]]:
    if isinstance(content, list):
        return [_part_of_item(part) for part in content]
    if isinstance(content, str):
        return content
    raise _Inexpressible


def _part_of_item(part: object) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"type": "input_text", "text": _text(part, "text")}
    image = part.get("image_url") if isinstance(part, dict) else None
    if kind == "image_url" and isinstance(image, dict):
        return {"type": "input_image", "image_url": _text(image, "url"), "detail": image.get("detail") or "auto"}
    raise _Inexpressible


# --- tools


def chat_tools(tools: object) -> list[dict[str, Any]]:
    """Return the tools that the model sees as tools of the chat API; tools that run elsewhere are not among them."""
    known = [tool for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    return [{"type": "function", "function": function} for tool in known for function in _functions(tool)]


def _functions(tool: Mapping[str, Any]) -> list[dict[str, Any]]:
    match tool.get("type"):
        case "function":
            return [_present(tool, _FUNCTION_FIELDS)]
        case "custom":
            return [{**_present(tool, ("name", "description")), "parameters": _CUSTOM_PARAMETERS}]
        case "namespace":
            inner = tool.get("tools")
            return [
                {**_present(one, _FUNCTION_FIELDS), "name": f"{tool.get('name')}__{one.get('name')}"}
                for one in (inner if isinstance(inner, list) else [])
                if isinstance(one, dict) and one.get("type") == "function"
            ]
        case _:
            return []


def response_tools(tools: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return tools of the chat API as those of the Responses API."""
    return [{"type": "function", **tool["function"]} for tool in tools]


def chat_tool_choice(choice: object) -> Any:
    """Return a choice of tools as that of the chat API; None if that has no such choice, or the engine would refuse
    it."""
    if choice in ("auto", "none", "required"):
        return choice
    if isinstance(choice, dict) and choice.get("type") in ("function", "custom") and choice.get("name"):
        return {"type": "function", "function": {"name": choice["name"]}}
    return None


def _present(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}
