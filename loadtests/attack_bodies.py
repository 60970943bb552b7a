"""Request bodies that are expensive for their size: each is a small unit repeated up to a size."""

import json
import random
from collections.abc import Callable, Mapping

CHAT = "/v1/chat/completions"
_MODEL = b"canned"
_HEAD = b'{"model":"' + _MODEL + b'",'
_USER = b'{"role":"user","content":"hi"}'
_MESSAGES = b'"messages":[' + _USER + b"]"

Shape = Callable[[int], bytes]


def repeated(before: bytes, unit: bytes, after: bytes, separator: bytes = b",") -> Shape:
    """A shape that repeats `unit` until the body has about the requested size in bytes."""

    def build(size: int) -> bytes:
        count = max(1, (size - len(before) - len(after)) // (len(unit) + len(separator)))
        return before + separator.join([unit] * count) + after

    return build


def numbered(before: bytes, unit: bytes, after: bytes) -> Shape:
    """The same with a running number in each unit, in place of `%d`."""

    def build(size: int) -> bytes:
        count = max(1, size // (len(unit) + 5))
        return before + b",".join(unit % number for number in range(count)) + after

    return build


def nested(before: bytes, opening: bytes, middle: bytes, closing: bytes, after: bytes, max_depth: int = 0) -> Shape:
    """A shape of nested brackets; `max_depth` 0: as deep as the size allows."""

    def build(size: int) -> bytes:
        depth = max(1, (size - len(before) - len(after)) // (len(opening) + len(closing)))
        depth = min(depth, max_depth) if max_depth else depth
        return before + opening * depth + middle + closing * depth + after

    return build


def _messages(unit: bytes) -> Shape:
    return repeated(_HEAD + b'"messages":[', unit, b"]}")


def _with_field(field: bytes, before: bytes, unit: bytes, after: bytes) -> Shape:
    return repeated(_HEAD + _MESSAGES + b"," + field + b":" + before, unit, after + b"}")


_CALL_FROM = (
    b'"messages":[{"role":"assistant","content":null,"tool_calls":'
    b'[{"id":"c","type":"function","function":{"name":"f","arguments":'
)
_CALL_TO = b'}}]},{"role":"tool","tool_call_id":"c","content":"x"}]}'

CHAT_SHAPES: Mapping[str, Shape] = {
    "messages {}": _messages(b"{}"),
    "messages 1": _messages(b"1"),
    "messages null": _messages(b"null"),
    "messages without text": _messages(b'{"role":"assistant"}'),
    "empty user messages": _messages(b'{"role":"user","content":""}'),
    "short messages": _messages(_USER),
    "system messages": _messages(b'{"role":"system","content":"x"}'),
    "tool messages": _messages(b'{"role":"tool","tool_call_id":"c","content":""}'),
    "text parts": repeated(_HEAD + b'"messages":[{"role":"user","content":[', b'{"type":"text","text":"a"}', b"]}]}"),
    "empty parts": repeated(_HEAD + b'"messages":[{"role":"user","content":[', b"{}", b"]}]}"),
    "image parts": repeated(
        _HEAD + b'"messages":[{"role":"user","content":[',
        b'{"type":"image_url","image_url":{"url":"data:image/png;base64,AAAA"}}',
        b"]}]}",
    ),
    "tool calls": repeated(
        _HEAD + b'"messages":[{"role":"assistant","tool_calls":[',
        b'{"id":"c","type":"function","function":{"name":"f","arguments":"{}"}}',
        b"]}]}",
    ),
    "arguments of numbers": repeated(_HEAD + _CALL_FROM + b'"[', b"1", b']"' + _CALL_TO),
    "arguments of objects": repeated(_HEAD + _CALL_FROM + b'"[', b"{}", b']"' + _CALL_TO),
    "arguments nested": nested(_HEAD + _CALL_FROM + b'"', b"[", b"1", b"]", b'"' + _CALL_TO),
    "arguments one key": repeated(_HEAD + _CALL_FROM + b'"{\\"', b"k", b'\\":1}"' + _CALL_TO, b""),
    "arguments not text": repeated(_HEAD + _CALL_FROM + b"[", b"1", b"]" + _CALL_TO),
    "tools": _with_field(b'"tools"', b"[", b'{"type":"function","function":{"name":"f","parameters":{}}}', b"]"),
    "tools of nulls": _with_field(b'"tools"', b"[", b"null", b"]"),
    "tool with enums": _with_field(
        b'"tools"', b'[{"type":"function","function":{"name":"f","parameters":{"enum":[', b'"e"', b"]}}}]"
    ),
    "stop strings": _with_field(b'"stop"', b"[", b'"s"', b"]"),
    "many strings": numbered(_HEAD + _MESSAGES + b',"stop":[', b'"string %d"', b"]}"),
    "metadata": numbered(_HEAD + _MESSAGES + b',"metadata":{', b'"k%d":"v"', b"}}"),
    "same key": _with_field(b'"metadata"', b"{", b'"k":1', b"}"),
    "many fields": numbered(_HEAD + _MESSAGES + b",", b'"f%d":1', b"}"),
    "logit_bias": numbered(_HEAD + _MESSAGES + b',"logit_bias":{', b'"%d":1', b"}}"),
    "template arguments": numbered(_HEAD + _MESSAGES + b',"chat_template_kwargs":{', b'"k%d":[]', b"}}"),
    "client salt": _with_field(b'"cache_salt"', b"[", b"1", b"]"),
    "client salt of text": repeated(_HEAD + _MESSAGES + b',"cache_salt":"', b"s", b'"}', b""),
    "user of text": repeated(_HEAD + _MESSAGES + b',"user":"', b"u", b'"}', b""),
    "prompt_cache_key": repeated(_HEAD + _MESSAGES + b',"prompt_cache_key":"', b"u", b'"}', b""),
    "nested lists": nested(_HEAD + _MESSAGES + b',"x":', b"[", b"", b"]", b"}"),
    "nested lists, 1,000 deep": nested(_HEAD + _MESSAGES + b',"x":', b"[", b"", b"]", b"}", 1000),
    "nested objects": nested(_HEAD + _MESSAGES + b',"x":', b'{"a":', b"1", b"}", b"}"),
    "nested content": nested(_HEAD + b'"messages":[{"role":"user","content":', b"[", b"", b"]", b"}]}", 1000),
    "number of digits": repeated(_HEAD + _MESSAGES + b',"seed":', b"7", b"}", b""),
    "number after a point": repeated(_HEAD + _MESSAGES + b',"temperature":0.', b"7", b"}", b""),
    "exponents": _with_field(b'"x"', b"[", b"1e308", b"]"),
    "model of text": repeated(b'{"model":"', b"m", b'",' + _MESSAGES + b"}", b""),
    "one key": repeated(_HEAD + _MESSAGES + b',"', b"k", b'":1}', b""),
    "one text": repeated(_HEAD + b'"messages":[{"role":"user","content":"', b"hello there ", b'"}]}', b""),
    "text of escapes": repeated(_HEAD + b'"messages":[{"role":"user","content":"', b"\\u0041", b'"}]}', b""),
    "text of emoji": repeated(_HEAD + b'"messages":[{"role":"user","content":"', "\U0001f600é".encode(), b'"}]}', b""),
    "text of one letter": repeated(_HEAD + b'"messages":[{"role":"user","content":"', b"a", b'"}]}', b""),
    "text of spaces": repeated(_HEAD + b'"messages":[{"role":"user","content":"', b" ", b'"}]}', b""),
    "text of lines": repeated(_HEAD + b'"messages":[{"role":"system","content":"', b"\\n", b'"}]}', b""),
    "text of reminders": repeated(
        _HEAD + b'"messages":[{"role":"user","content":"', b"<system-reminder>a</system-reminder>", b'"}]}', b""
    ),
    "text of dates": repeated(
        _HEAD + b'"messages":[{"role":"system","content":"', b"Current time: 2026-01-01 10:00\\n", b'"}]}', b""
    ),
    "space around": repeated(b"", b" ", _HEAD + _MESSAGES + b"}", b""),
    "no JSON": repeated(b"", b"\xff", b"", b""),
    "open brackets": repeated(b"", b"[", b"", b""),
    "open objects": repeated(b"", b'{"a":', b"", b""),
}
"""Bodies of chat completions."""

OTHER_SHAPES: Mapping[str, tuple[str, Shape]] = {
    "completions of token ids": ("/v1/completions", repeated(_HEAD + b'"prompt":[', b"1", b"]}")),
    "completions of texts": ("/v1/completions", repeated(_HEAD + b'"prompt":[', b'"a"', b"]}")),
    "completions of lists": ("/v1/completions", repeated(_HEAD + b'"prompt":[', b"[1]", b"]}")),
    "completions of text": ("/v1/completions", repeated(_HEAD + b'"prompt":"', b"word ", b'"}', b"")),
    "responses of items": (
        "/v1/responses",
        repeated(_HEAD + b'"input":[', b'{"type":"message","role":"user","content":"a"}', b"]}"),
    ),
    "responses of {}": ("/v1/responses", repeated(_HEAD + b'"input":[', b"{}", b"]}")),
    "responses of parts": (
        "/v1/responses",
        repeated(_HEAD + b'"input":[{"role":"user","content":[', b'{"type":"input_text","text":"a"}', b"]}]}"),
    ),
    "responses instructions": ("/v1/responses", repeated(_HEAD + b'"input":"a","instructions":"', b"x\\n", b'"}', b"")),
    "messages of blocks": (
        "/v1/messages",
        repeated(
            _HEAD + b'"max_tokens":9,"messages":[{"role":"user","content":[', b'{"type":"text","text":"a"}', b"]}]}"
        ),
    ),
    "messages of system blocks": (
        "/v1/messages",
        repeated(_HEAD + b'"max_tokens":9,' + _MESSAGES + b',"system":[', b'{"type":"text","text":"a"}', b"]}"),
    ),
    "messages of tools": (
        "/v1/messages",
        repeated(_HEAD + b'"max_tokens":9,' + _MESSAGES + b',"tools":[', b'{"name":"f","input_schema":{}}', b"]}"),
    ),
    "messages of tool uses": (
        "/v1/messages",
        repeated(
            _HEAD + b'"max_tokens":9,"messages":[{"role":"assistant","content":[',
            b'{"type":"tool_use","id":"i","name":"n","input":{"a":[1]}}',
            b"]}]}",
        ),
    ),
    "messages user_id": (
        "/v1/messages",
        repeated(_HEAD + b'"max_tokens":9,' + _MESSAGES + b',"metadata":{"user_id":"', b"_session_", b'"}}', b""),
    ),
    "count_tokens of messages": ("/v1/messages/count_tokens", repeated(_HEAD + b'"messages":[', _USER, b"]}")),
    "embeddings": ("/v1/embeddings", repeated(_HEAD + b'"input":[', b'"a"', b"]}")),
    "embeddings of {}": ("/v1/embeddings", repeated(_HEAD + b'"input":[', b"{}", b"]}")),
    "batch": ("/v1/chat/completions/batch", repeated(_HEAD + b'"messages":[[', _USER, b"]]}")),
    "tokenize of messages": ("/tokenize", repeated(_HEAD + b'"messages":[', _USER, b"]}")),
    "detokenize": ("/detokenize", repeated(_HEAD + b'"tokens":[', b"1", b"]}")),
    "freeze with a key": ("/admin/windows", repeated(b'{"session_id":"a","window_name":"b","', b"k", b'":1}', b"")),
    "freeze with keys": ("/admin/windows", numbered(b'{"session_id":"a","window_name":"b",', b'"k%d":1', b"}")),
    "freeze with tags": ("/admin/windows", repeated(b'{"session_id":"a","window_name":"b","tags":[', b'"t"', b"]}")),
    "freeze with a tag": (
        "/admin/windows",
        repeated(b'{"session_id":"a","window_name":"b","tags":["', b"t", b'"]}', b""),
    ),
    "freeze with a name": ("/admin/windows", repeated(b'{"session_id":"a","window_name":"', b"n", b'"}', b"")),
    "freeze with a description": (
        "/admin/windows",
        repeated(b'{"session_id":"a","window_name":"b","description":"', b"d", b'"}', b""),
    ),
    "freeze nested": ("/admin/windows", nested(b'{"session_id":', b"[", b"", b"]", b"}", 1000)),
    "policies with keys": ("PUT /admin/policies", numbered(b"{", b'"k%d":1', b"}")),
    "policies with a key": ("PUT /admin/policies", repeated(b'{"', b"idle_timeout_minute", b'":1}', b"")),
    "ask": ("/admin/windows/w/ask", repeated(b'{"question":"', b"q", b'"}', b"")),
    "patch": ("PATCH /admin/windows/w", repeated(b'{"description":"', b"q", b'"}', b"")),
    "mcp arguments": (
        "/mcp",
        repeated(
            b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"window_list","arguments":{"tags":[',
            b'"t"',
            b"]}}}",
        ),
    ),
    "mcp batch": ("/mcp", repeated(b"[", b'{"jsonrpc":"2.0","id":1,"method":"ping"}', b"]")),
    "mcp nested": ("/mcp", nested(b'{"jsonrpc":"2.0","id":1,"method":"ping","params":', b"[", b"", b"]", b"}", 1000)),
    "import of nothing": ("/admin/windows/import", repeated(b"", b"\0", b"", b"")),
    "doctor": ("/admin/doctor", repeated(b'{"', b"k", b'":1}', b"")),
}
"""Bodies for all other endpoints: method (POST if omitted) and path, and the shape."""


def random_body(rng: random.Random, budget: int) -> bytes:
    """Return a chat-like body of about `budget` bytes: random JSON in fields that the gateway interprets."""
    fields = ["messages", "tools", "metadata", "input", "prompt", "system", "instructions", "stop", "x", "content"]
    parts = [b'"model":"' + _MODEL + b'"']
    left = budget
    while left > 0:
        size = max(8, int(left * rng.random())) if rng.random() < 0.7 else left
        parts.append(json.dumps(rng.choice(fields)).encode() + b":" + _random_value(rng, size, 0))
        left -= size + 16
    return b"{" + b",".join(parts) + b"}"


def _random_value(rng: random.Random, size: int, depth: int) -> bytes:
    kind = rng.choice(("list", "object", "text", "digits", "flat")) if depth < 40 else "text"
    if kind == "text" or size < 16:
        return b'"' + rng.choice((b"a", b"\\u00e9", "ü".encode(), b"\\n", b"0")) * (size // 4) + b'"'
    if kind == "digits":
        return b"1" * min(size, 4000) if rng.random() < 0.5 else b"0." + b"1" * size
    if kind == "flat":
        unit = rng.choice((b"1", b"{}", b"[]", b'""', _USER, b'{"type":"text","text":"t"}', b"null", b"-1.5e3"))
        return b"[" + b",".join([unit] * max(1, size // (len(unit) + 1))) + b"]"
    count = rng.randint(1, 6)
    inner = [_random_value(rng, size // count, depth + 1) for _ in range(count)]
    if kind == "list":
        return b"[" + b",".join(inner) + b"]"
    names = rng.sample(("role", "content", "type", "text", "function", "arguments", "id", "name"), count)
    return b"{" + b",".join(b'"' + name.encode() + b'":' + each for name, each in zip(names, inner, strict=True)) + b"}"
