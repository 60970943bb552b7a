"""Convert Messages requests to chat, exactly as vLLM does before it renders a prompt.

vllm 0.32, entrypoints/anthropic/serving.py: blocks of the top-level `system` become one system message, tool results
come before whatever else their message says, billing headers of Claude Code and redacted thinking are dropped.
A system message between others stays where it is; an engine whose template wants them all in front merges them
(`transcripts.hoisted`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.dialects.prompt_filters import BILLING_HEADER
from gateway.records import Message

Block = Mapping[str, Any]

_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_TOOL_CHANGES = frozenset({"tool_addition", "tool_removal"})


class Unreadable(Exception):
    """The engine will refuse this request, and say why."""


def conversation(body: Mapping[str, Any]) -> list[Message]:
    """Return the messages that the engine makes of `system` and `messages`. Raises Unreadable."""
    sent = body.get("messages")
    if not isinstance(sent, list):
        raise Unreadable
    messages = _system(body.get("system"))
    for message in sent:
        messages += converted(message)
    return messages


def frame(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything but the messages that the prompt is rendered from. Raises Unreadable."""
    frame: dict[str, Any] = {}
    if tools := _tools(body):
        frame |= {"tools": [_tool(tool) for tool in tools], **_tool_choice(body.get("tool_choice"))}
    effort = _dict(body, "output_config").get("effort")
    # vLLM reads that as "none", unless the template does not know that; then no effort changes the prompt.
    effort = "none" if _dict(body, "thinking").get("type") == "disabled" else effort
    if effort is not None:
        frame["reasoning_effort"] = effort
    if kwargs := _dict(body, "chat_template_kwargs"):
        frame["chat_template_kwargs"] = kwargs
    return frame


def converted(message: object) -> list[Message]:
    """Return what the engine makes of one message: one, several, or none. Raises Unreadable."""
    if not isinstance(message, dict):
        raise Unreadable
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise Unreadable
    if role == "system":
        return [] if isinstance(content, str) and content.startswith(BILLING_HEADER) else _system(content)
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    parts = _Parts(role)
    for block in _blocks(content):
        parts.add(block)
    return parts.whole()


def assistant(blocks: Sequence[Block]) -> Message:
    """Return what a reply's content is when it is sent back. Raises Unreadable."""
    (message,) = converted({"role": "assistant", "content": blocks})
    return message


def tool_changes(message: Mapping[str, Any]) -> list[Block]:
    """The blocks of a system message that are not text, but change the tools."""
    content = message.get("content")
    blocks = [] if isinstance(content, str) else _blocks(content)
    return [block for block in blocks if block.get("type") in _TOOL_CHANGES]


def _system(system: object) -> list[Message]:
    if not system:
        return []
    text = system if isinstance(system, str) else "".join(_system_texts(_blocks(system)))
    return [{"role": "system", "content": text}] if text else []


def _system_texts(blocks: Iterable[Block]) -> Iterable[str]:
    texts = (_text(block, "text") for block in blocks if block.get("type") == "text")
    return (text for text in texts if not text.startswith(BILLING_HEADER))


@dataclass(slots=True)
class _Parts:
    """One message taken apart."""

    role: str
    before: list[Message] = field(default_factory=list)  # results of tools, which are messages of their own
    content: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)

    def add(self, block: Block) -> None:
        match block.get("type"):
            case "text":
                if text := _text(block, "text"):
                    self.content.append({"type": "text", "text": text})
            case "thinking" if block.get("thinking") is not None:
                self.reasoning.append(_text(block, "thinking"))
            case "tool_use":
                self.calls.append(_call(block))
            case "tool_result" if self.role == "user":
                self.before += _result(block)
            case "tool_result":
                self.content.append({"type": "text", "text": f"Tool result: {block.get('content') or ''}"})
            case "image" if block.get("source"):
                self.content.append(_image(block["source"]))
            case "image" | "thinking" | "redacted_thinking" | "tool_reference":
                pass
            case _:
                raise Unreadable

    def whole(self) -> list[Message]:
        message: Message = {"role": self.role}
        if self.reasoning:
            message["reasoning"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = self.calls
        if len(self.content) == 1 and self.content[0]["type"] == "text":
            message["content"] = self.content[0]["text"]
        elif self.content:
            message["content"] = self.content
        return [*self.before, message] if self.role != "user" or self.content else self.before


def _call(block: Block) -> dict[str, Any]:
    try:
        arguments = json.dumps(_dict(block, "input"))
    except RecursionError as error:  # nested too deep for vLLM's own parser as well
        raise Unreadable from error
    function = {"name": _text(block, "name"), "arguments": arguments}
    return {"id": _text(block, "id"), "type": "function", "function": function}


def _result(block: Block) -> list[Message]:
    """A tool's text, then its images as if the user had sent them, then the tools that it refers to."""
    content, call_id = block.get("content"), _text(block, "tool_use_id")
    items = [] if isinstance(content, str) else _items(content)
    text = content if isinstance(content, str) else "\n".join(_text(i, "text") for i in items if i["type"] == "text")
    images = [_image(item.get("source") or {}) for item in items if item["type"] == "image"]
    images = [image for image in images if image["image_url"]["url"]]
    names = [item.get("tool_name") or item.get("name") for item in items if item["type"] == "tool_reference"]
    references = [{"type": "tool_reference", "name": name} for name in names if name]
    messages: list[Message] = [{"role": "tool", "tool_call_id": call_id, "content": text}]
    if images:
        messages.append({"role": "user", "content": images})
    if references:
        messages.append({"role": "tool", "tool_call_id": call_id, "content": references})
    return messages


def _image(source: object) -> dict[str, Any]:
    if not isinstance(source, dict):
        raise Unreadable
    if source.get("type") == "url":
        return {"type": "image_url", "image_url": {"url": _text(source, "url")}}
    url = f"data:{source.get('media_type', 'image/jpeg')};base64,{source.get('data', '')}"
    return {"type": "image_url", "image_url": {"url": url}}


def _tools(body: Mapping[str, Any]) -> Sequence[Block]:
    """The tools at the end of the conversation: those declared, and what system messages then added and removed."""
    declared: list[Block] = [*_blocks(body.get("tools"))]
    changes = [change for m in body["messages"] if m.get("role") == "system" for change in tool_changes(m)]
    if not changes:
        return declared
    tools = {_text(tool, "name"): tool for tool in declared}
    removed: set[str] = set()
    for change in changes:
        tool = _dict(change, "tool")
        definition = _dict(tool, "definition") if tool.get("type") == "tool_definition" else {}
        name = _text(definition or tool, "name")
        removed.discard(name)
        if definition:
            tools[name] = definition
        elif name not in tools:
            raise Unreadable
        elif change["type"] == "tool_removal":
            removed.add(name)
        else:
            tools[name] = {**tools[name], "defer_loading": None}
    return [tool for name, tool in tools.items() if name not in removed]


def _tool(tool: Block) -> dict[str, Any]:
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        raise Unreadable
    function: dict[str, Any] = {"name": _text(tool, "name")}
    if tool.get("description") is not None:
        function["description"] = _text(tool, "description")
    function["parameters"] = schema if "type" in schema else {**schema, "type": "object"}
    function |= {name: tool[name] for name in ("strict", "defer_loading") if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: object) -> dict[str, Any]:
    if choice is None:
        return {}
    if not isinstance(choice, dict):
        raise Unreadable
    kind = choice.get("type")
    if kind == "tool":
        chosen: Any = {"type": "function", "function": {"name": _text(choice, "name")}}
    elif kind in _TOOL_CHOICES:
        chosen = _TOOL_CHOICES[kind]
    else:
        raise Unreadable
    return {"tool_choice": chosen, "parallel_tool_calls": not choice.get("disable_parallel_tool_use")}


def _items(content: object) -> list[dict[str, Any]]:
    """The parts of a tool's result that have a type; vLLM ignores all others."""
    return [item for item in _blocks(content) if isinstance(item.get("type"), str)]


def _blocks(value: object) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not {*map(type, value)} <= {dict}:
        raise Unreadable
    return value


def _text(block: Block, name: str) -> str:
    value = block.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unreadable
    return value


def _dict(block: Block, name: str) -> dict[str, Any]:
    value = block.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Unreadable
    return value
