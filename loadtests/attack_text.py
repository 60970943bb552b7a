"""Untrusted text in output: on the terminal, in the log, in errors and headers; and names that are too long."""

import contextlib
import time
from collections.abc import Mapping, Sequence

from loadtests.attack_harness import KEY, Engine, Gateway, Testbed, Trials, Verdict, check_all, head, measure, verdict
from tests.support.fakes.engine import MODEL, Exchange, usage_of, whole_reply

TRIALS = Trials()
_ESCAPES = "\x1b]52;c;ZXZpbA==\x07\x1b]0;evil\x07\x1b[2J\x9b31m\x08\x7f\u202e red [red]bold[/x]"
_BAD = ("\x1b", "\x07", "\x9b", "\x08", "\x7f")
_CHAT = "/v1/chat/completions"


def _gateway_with_escapes(testbed: Testbed) -> Gateway:
    """Start a gateway whose engine answers with escape sequences, and freeze such a conversation."""
    engine = testbed.engine()
    engine.on_chat = lambda exchange: exchange.json(whole_reply(f"reply {_ESCAPES}", usage_of(10, 3)))
    gateway = testbed.gateway(engine.url)
    gateway.chat("s", f"hello {_ESCAPES}")
    gateway.post("/admin/windows", {"session_id": "s", "window_name": "w", "description": f"about {_ESCAPES}"})
    gateway.chat("m", "x", model=f"model {_ESCAPES}")
    gateway.chat("n", "x", model="[/x]")
    return gateway


@TRIALS.add
def terminal_escapes(testbed: Testbed) -> Verdict:
    """No cwg command writes foreign escape sequences to the terminal, or fails because of one"""
    gateway = _gateway_with_escapes(testbed)
    commands = (
        ("messages", "w"), ("status", "w"), ("list",), ("sessions",), ("ask", "w", "what?"), ("tree",), ("verify", "w"),
        ("thaw", "w"), ("clone", "w", "v"), ("policy",), ("delete", "v"),
    )  # fmt: skip
    failures = []
    for command in commands:
        process = gateway.run_cli(*command)
        output = (process.stdout + process.stderr).decode(errors="replace")
        escapes = [repr(letter) for letter in _BAD if letter in output]
        expected = command[0] == "verify"  # there is no KV to verify
        if escapes or process.returncode != expected or "Traceback" in output:
            traceback = "Traceback" * ("Traceback" in output)
            failures.append(f"cwg {command[0]}: {process.returncode} {' '.join(escapes)} {traceback}")
    return verdict(not failures, *(f"NOT {failure}" for failure in failures), f"{len(commands)} commands")


@TRIALS.add
def log_injection(testbed: Testbed) -> Verdict:
    """Nothing a client sends forges a log line or writes an escape sequence to the log"""
    gateway = testbed.gateway(testbed.engine().url)
    deep = (
        b'{"model":"demo","messages":[{"role":"user","content":"x"}],"cache_salt":' + b"[" * 1000 + b"]" * 1000 + b"}"
    )
    forged = "2026-01-01%2000:00:00%20CRITICAL%20forged"
    paths = [
        f"/v1/x%0a{forged}",
        f"/v1/x%0d%0a{forged}%1b[2J",
        f"/v1/embeddings%0a{forged}",
        f"/admin/x%0a{forged}",
        f"/s/a%0a{forged}{_CHAT}",
        f"/admin/windows/%0a{forged}/thaw",
    ]
    for path in paths:
        gateway.send_raw(head("POST", path, "connection: close", length=len(deep)) + deep)
    hint = "a\rb\x1b[2J"
    gateway.send_raw(
        head("POST", _CHAT, f"x-context-hint: {hint}", "x-session-id: \x1b[2J", "connection: close", length=len(deep))
        + deep
    )
    gateway.post(_CHAT, {"model": f"a\n{forged}\x1b", "messages": [{"role": "user", "content": "x"}], "tools": True})
    gateway.post(_CHAT, {"model": MODEL, "messages": [{"role": "\x1b\nforged", "content": "x"}]})
    time.sleep(0.5)
    lines = gateway.log.splitlines()
    failures = [
        line[:120]
        for line in lines
        if line.startswith(("2026-01-01", "forged")) or any(bad in line for bad in _BAD) or "\r" in line
    ]
    return verdict(not failures, *(f"NOT {line!r}" for line in failures[:4]), f"{len(lines)} lines")


@TRIALS.add
def header_injection(testbed: Testbed) -> Verdict:
    """A header built from an engine's error or a client's hint contains no line break"""
    engine = testbed.engine()
    engine.on_chat = lambda e: e.json(
        {"error": {"message": "a\r\nx-evil: 1\r\n\r\nb\x1b", "type": "BadRequestError"}}, 400
    )
    gateway = testbed.gateway(engine.url, on_full="successor")
    answer = gateway.chat("a", "x")
    return verdict(answer.status == 400 and "x-evil" not in answer.headers, answer.status)


_INVALID_VALUES: list[object] = [
    True, 1, "x", None, [], {}, [1], [None], [[]], [{}], {"a": 1}, 1e308, -1, "\ud7ff", [True],
]  # fmt: skip
_FIELDS = (
    "tools", "tool_choice", "stream_options", "metadata", "chat_template_kwargs", "user", "stop", "response_format",
    "prompt_cache_key", "reasoning", "stream", "n", "logit_bias", "max_tokens",
)  # fmt: skip
_MESSAGE_FIELDS = (
    "content", "tool_calls", "role", "name", "tool_call_id", "reasoning", "function_call", "audio", "refusal",
)  # fmt: skip
_OTHER_FIELDS = (
    ("/v1/responses", "input"), ("/v1/messages", "messages"), ("/v1/messages", "system"), ("/v1/completions", "prompt"),
    ("/v1/messages", "metadata"), ("/v1/responses", "conversation"), ("/v1/responses", "previous_response_id"),
)  # fmt: skip


@TRIALS.add
def tracebacks(testbed: Testbed) -> Verdict:
    """Values of the wrong type cause no traceback and no 5xx"""
    gateway = testbed.gateway(testbed.engine().url)
    user = {"role": "user", "content": "x"}
    statuses: dict[str, int] = {}
    for value in _INVALID_VALUES:
        for name in _FIELDS:
            statuses[f"{name}={value!r}"] = gateway.post(
                _CHAT, {"model": MODEL, "messages": [user], name: value}
            ).status
        for name in _MESSAGE_FIELDS:
            messages = [user, {"role": "assistant", "content": "x", name: value}, user]
            statuses[f"message {name}={value!r}"] = gateway.post(_CHAT, {"model": MODEL, "messages": messages}).status
        for path, name in _OTHER_FIELDS:
            base = {"model": MODEL, "max_tokens": 5, "messages": [user], "input": "x", "prompt": "x"}
            statuses[f"{path} {name}={value!r}"] = gateway.post(path, base | {name: value}).status
    time.sleep(0.5)
    failures = [f"{name}: {status}" for name, status in statuses.items() if status >= 500 or not status]
    traces = gateway.log.count("Traceback")
    return verdict(
        not failures and not traces,
        *(f"NOT {failure}" for failure in failures[:6]),
        f"{traces} tracebacks",
        f"{len(statuses)} invalid values",
    )


_NESTED: Mapping[str, tuple[str, Sequence[str]]] = {
    _CHAT: (
        '{"model":"demo","messages":[{"role":"user","content":"x"}],"%s":%s}',
        ("cache_salt", "tools", "metadata", "user", "x", "stop"),
    ),
    "/v1/messages": (
        '{"model":"demo","max_tokens":1,"messages":[{"role":"user","content":"x"}],"%s":%s}',
        ("system", "metadata", "tools"),
    ),
    "/v1/responses": (
        '{"model":"demo","input":"x","%s":%s}',
        ("input", "conversation", "previous_response_id", "tools"),
    ),
    "/v1/embeddings": ('{"model":"demo","%s":%s}', ("input", "cache_salt")),
    "/admin/windows": (
        '{"session_id":"a","window_name":"b","%s":%s}',
        ("tags", "description", "ttl_seconds", "session_id", "x"),
    ),
    "/admin/windows/w/ask": ('{"%s":%s}', ("question", "max_tokens")),
    "/admin/policies/check": ('{"%s":%s}', ("session_id", "x")),
    "/mcp": (
        '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"window_list","arguments":{"%s":%s}}}',
        ("tags", "search"),
    ),
}


@TRIALS.add
def nested_bodies(testbed: Testbed) -> Verdict:
    """No nesting depth, in any field of any endpoint, causes a 500"""
    gateway = testbed.gateway(testbed.engine().url)
    failures, tried = [], 0
    for path, (template, names) in _NESTED.items():
        for name in names:
            for depth in (90, 250, 500, 990, 1000, 1010, 1020, 1023, 1024, 1025, 3000):
                for opening, closing in (("[", "]"), ('{"a":', "}")):
                    value = opening * depth + "1" + closing * depth
                    body = (template % (name, value)).encode()
                    tried += 1
                    answer = gateway.post(path, body, {"accept": "application/json, text/event-stream"})
                    if answer.status >= 500 or not answer.status:
                        failures.append(f"{path} {name} {depth} deep: {answer.status}")
    for depth in (200, 251, 252, 253, 400, 1000):
        value = "[" * depth + "]" * depth
        tools = f'{{"model":"demo","messages":[{{"role":"user","content":"x"}}],"tools":{value}}}'
        content = f'{{"model":"demo","messages":[{{"role":"user","content":{value}}}]}}'
        gateway.post(_CHAT, tools.encode(), {"x-session-id": f"deep-{depth}"})
        gateway.post(_CHAT, content.encode(), {"x-session-id": f"content-{depth}"})
        for name in (f"deep-{depth}", f"content-{depth}"):
            shown = gateway.get(f"/admin/sessions/{name}").status
            frozen = gateway.freeze(name, name).status
            read = gateway.get(f"/admin/windows/{name}/messages").status
            if max(shown, frozen, read) >= 500 and frozen != 502:
                failures.append(f"{name}: session {shown}, freeze {frozen}, messages {read}")
    return verdict(not failures, *(f"NOT {failure}" for failure in failures[:8]), f"{tried} bodies")


@TRIALS.add
def model_names(testbed: Testbed) -> Verdict:
    """A 20 MB model name is not stored, nor are long names that no engine serves"""
    engine = testbed.engine(_EngineOfOneModel())
    gateway = testbed.gateway(engine.url)
    store = gateway.data / "gateway.db-wal"
    before = sum(file.stat().st_size for file in gateway.data.glob("gateway.db*"))
    impact = measure(gateway, lambda: gateway.chat("big", "x", model="m" * (20 * 2**20)).status, 20 * 2**20)
    for number in range(20):
        gateway.chat(f"long-{number}", "x", model=f"{number}" + "m" * 100_000)
    listed = gateway.get("/admin/sessions")
    with contextlib.suppress(OSError):
        store.stat()
    store_growth = sum(file.stat().st_size for file in gateway.data.glob("gateway.db*")) - before
    return verdict(
        impact.within_limits and len(listed.body) < 2**17 and store_growth < 2**20,
        impact,
        f"store +{store_growth >> 10} KB",
        f"list {len(listed.body) >> 10} KB",
    )


class _EngineOfOneModel(Engine):
    """Answers 404 for a model it does not serve, as vLLM does."""

    def answer_chat(self, exchange: Exchange) -> None:
        """See FakeEngine."""
        if exchange.request.json.get("model") == MODEL:
            super().answer_chat(exchange)
        else:
            exchange.json({"error": {"message": "no such model", "code": 404}}, 404)


@TRIALS.add
def engine_passwords(testbed: Testbed) -> Verdict:
    """A password in engine_urls is refused, or never shown"""
    engine = testbed.engine()
    url = engine.url.replace("http://", "http://user:hunter2@")
    gateway = testbed.unstarted_gateway(url)
    try:
        gateway.start("/healthz", within=15)
    except RuntimeError:
        return verdict(True, "it does not start")
    engine.stop()
    shown = [
        gateway.chat("a", "x").body,
        gateway.get("/admin/health").body,
        gateway.get("/admin/sessions/a").body,
        gateway.log.encode(),
    ]
    places = [name for name, text in zip(("502", "health", "session", "log"), shown, strict=True) if b"hunter2" in text]
    return verdict(not places, "shown in " + ", ".join(places) if places else "not shown")


def _respond(exchange: Exchange) -> None:
    """Answer /v1/responses with the input as output, always under the same id."""
    text = {"type": "output_text", "text": str(exchange.request.json.get("input")), "annotations": []}
    message = {"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": [text]}
    usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
    answer = {"id": "resp_fixed", "object": "response", "model": MODEL, "status": "completed", "output": [message]}
    exchange.json({**answer, "usage": usage})


@TRIALS.add
def foreign_response_ids(testbed: Testbed) -> Verdict:
    """A client that reuses another session's response id does not replace that response"""
    engine = testbed.engine()
    engine.on_other = _respond
    gateway = testbed.gateway(engine.url)
    for session, text in (("victim", "secret"), ("thief", "evil")):
        gateway.post(
            "/v1/responses",
            {"model": MODEL, "input": text, "request_id": "resp_fixed", "store": True},
            {"x-session-id": session},
        )
        gateway.get(f"/admin/sessions/{session}")
    kept = gateway.get("/v1/responses/resp_fixed")
    return check_all({"the first response stays, or the second is refused": b"evil" not in kept.body}, f"{kept.status}")


@TRIALS.add
def keys_in_output(testbed: Testbed) -> Verdict:
    """The API key appears in no log, and the engine does not get it"""
    engine = testbed.engine()
    gateway = testbed.gateway_in_front_of(engine, api_key=KEY, log_level="debug")
    gateway.chat("a", "x")
    gateway.get("/admin/windows/none")
    gateway.send_raw(head("GET", f"/admin/x?key={KEY}", f"authorization: Bearer {KEY}", "connection: close"))
    sent = any(KEY in value for request in engine.asked for _, value in request.headers)
    shown = KEY in gateway.log.replace(f"key={KEY}", "")
    return check_all({"not in the log": not shown, "not at the engine": not sent}, f"{len(engine.asked)} requests")
