"""What comes from outside and is shown: on a terminal, in the log, in errors; and names that are too much."""

import contextlib
import time
from collections.abc import Mapping, Sequence

from loadtests.attack_rig import KEY, Engine, Gateway, Ground, Trials, Verdict, effect, first_false, head, verdict
from tests.support.fakes.engine import MODEL, Exchange, usage_of, whole_reply

TRIALS = Trials()
_ESCAPES = "\x1b]52;c;ZXZpbA==\x07\x1b]0;evil\x07\x1b[2J\x9b31m\x08\x7f\u202e red [red]bold[/x]"
_BAD = ("\x1b", "\x07", "\x9b", "\x08", "\x7f")
_CHAT = "/v1/chat/completions"


def _speaking(ground: Ground) -> Gateway:
    """A gateway whose engine answers with escapes, and a window of such a conversation."""
    engine = ground.engine()
    engine.on_chat = lambda exchange: exchange.json(whole_reply(f"reply {_ESCAPES}", usage_of(10, 3)))
    gateway = ground.gateway(engine.url)
    gateway.chat("s", f"hello {_ESCAPES}")
    gateway.post("/admin/windows", {"session_id": "s", "window_name": "w", "description": f"about {_ESCAPES}"})
    gateway.chat("m", "x", model=f"model {_ESCAPES}")
    gateway.chat("n", "x", model="[/x]")
    return gateway


@TRIALS.add
def terminal(ground: Ground) -> Verdict:
    """No command of cwg writes an escape of somebody else to the terminal, or fails over one"""
    gateway = _speaking(ground)
    commands = (
        ("messages", "w"), ("status", "w"), ("list",), ("sessions",), ("ask", "w", "what?"), ("tree",), ("verify", "w"),
        ("thaw", "w"), ("clone", "w", "v"), ("policy",), ("delete", "v"),
    )  # fmt: skip
    wrong = []
    for command in commands:
        done = gateway.cli(*command)
        shown = (done.stdout + done.stderr).decode(errors="replace")
        found = [repr(letter) for letter in _BAD if letter in shown]
        if found or done.returncode or "Traceback" in shown:
            wrong.append(
                f"cwg {command[0]}: {done.returncode} {' '.join(found)} {'Traceback' * ('Traceback' in shown)}"
            )
    return verdict(not wrong, *(f"NOT {each}" for each in wrong), f"{len(commands)} commands")


@TRIALS.add
def log_lines(ground: Ground) -> Verdict:
    """Nothing that a client sends writes a line of its own, or an escape, into the log"""
    gateway = ground.gateway(ground.engine().url)
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
        gateway.raw(head("POST", path, "connection: close", length=len(deep)) + deep)
    hint = "a\rb\x1b[2J"
    gateway.raw(
        head("POST", _CHAT, f"x-context-hint: {hint}", "x-session-id: \x1b[2J", "connection: close", length=len(deep))
        + deep
    )
    gateway.post(_CHAT, {"model": f"a\n{forged}\x1b", "messages": [{"role": "user", "content": "x"}], "tools": True})
    gateway.post(_CHAT, {"model": MODEL, "messages": [{"role": "\x1b\nforged", "content": "x"}]})
    time.sleep(0.5)
    lines = gateway.log.splitlines()
    wrong = [
        line[:120]
        for line in lines
        if line.startswith(("2026-01-01", "forged")) or any(bad in line for bad in _BAD) or "\r" in line
    ]
    return verdict(not wrong, *(f"NOT {line!r}" for line in wrong[:4]), f"{len(lines)} lines")


@TRIALS.add
def hints_in_streams(ground: Ground) -> Verdict:
    """A header that an engine's error or a client's hint goes into holds no line break"""
    engine = ground.engine()
    engine.on_chat = lambda e: e.json(
        {"error": {"message": "a\r\nx-evil: 1\r\n\r\nb\x1b", "type": "BadRequestError"}}, 400
    )
    gateway = ground.gateway(engine.url, on_full="successor")
    answer = gateway.chat("a", "x")
    return verdict(answer.status == 400 and "x-evil" not in answer.headers, answer.status)


_ODD: list[object] = [
    True, 1, "x", None, [], {}, [1], [None], [[]], [{}], {"a": 1}, 1e308, -1, "\ud7ff", [True],
]  # fmt: skip
_FIELDS = (
    "tools", "tool_choice", "stream_options", "metadata", "chat_template_kwargs", "user", "stop", "response_format",
    "prompt_cache_key", "reasoning", "stream", "n", "logit_bias", "max_tokens",
)  # fmt: skip
_OF_A_MESSAGE = (
    "content", "tool_calls", "role", "name", "tool_call_id", "reasoning", "function_call", "audio", "refusal",
)  # fmt: skip
_ELSEWHERE = (
    ("/v1/responses", "input"), ("/v1/messages", "messages"), ("/v1/messages", "system"), ("/v1/completions", "prompt"),
    ("/v1/messages", "metadata"), ("/v1/responses", "conversation"), ("/v1/responses", "previous_response_id"),
)  # fmt: skip


@TRIALS.add
def tracebacks(ground: Ground) -> Verdict:
    """Odd values where a list or an object is due write no traceback, and give no 5xx"""
    gateway = ground.gateway(ground.engine().url)
    user = {"role": "user", "content": "x"}
    seen: dict[str, int] = {}
    for value in _ODD:
        for name in _FIELDS:
            seen[f"{name}={value!r}"] = gateway.post(_CHAT, {"model": MODEL, "messages": [user], name: value}).status
        for name in _OF_A_MESSAGE:
            said = [user, {"role": "assistant", "content": "x", name: value}, user]
            seen[f"message {name}={value!r}"] = gateway.post(_CHAT, {"model": MODEL, "messages": said}).status
        for path, name in _ELSEWHERE:
            base = {"model": MODEL, "max_tokens": 5, "messages": [user], "input": "x", "prompt": "x"}
            seen[f"{path} {name}={value!r}"] = gateway.post(path, base | {name: value}).status
    time.sleep(0.5)
    wrong = [f"{name}: {status}" for name, status in seen.items() if status >= 500 or not status]
    traces = gateway.log.count("Traceback")
    return verdict(
        not wrong and not traces,
        *(f"NOT {each}" for each in wrong[:6]),
        f"{traces} tracebacks",
        f"{len(seen)} odd values",
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
def nested(ground: Ground) -> Verdict:
    """No depth of nesting, at any field of any door, is a 500"""
    gateway = ground.gateway(ground.engine().url)
    wrong, tried = [], 0
    for path, (template, names) in _NESTED.items():
        for name in names:
            for depth in (90, 250, 500, 990, 1000, 1010, 1020, 1023, 1024, 1025, 3000):
                for opening, closing in (("[", "]"), ('{"a":', "}")):
                    value = opening * depth + "1" + closing * depth
                    body = (template % (name, value)).encode()
                    tried += 1
                    answer = gateway.post(path, body, {"accept": "application/json, text/event-stream"})
                    if answer.status >= 500 or not answer.status:
                        wrong.append(f"{path} {name} {depth} deep: {answer.status}")
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
                wrong.append(f"{name}: session {shown}, freeze {frozen}, messages {read}")
    return verdict(not wrong, *(f"NOT {each}" for each in wrong[:8]), f"{tried} bodies")


@TRIALS.add
def names_of_models(ground: Ground) -> Verdict:
    """A model's name of 20 MB is not kept, and one of 501 characters that nobody serves is not either"""
    engine = ground.engine(_Refusing())
    gateway = ground.gateway(engine.url)
    store = gateway.data / "gateway.db-wal"
    before = sum(file.stat().st_size for file in gateway.data.glob("gateway.db*"))
    seen = effect(gateway, lambda: gateway.chat("big", "x", model="m" * (20 * 2**20)).status, 20 * 2**20)
    for number in range(20):
        gateway.chat(f"long-{number}", "x", model=f"{number}" + "m" * 100_000)
    listed = gateway.get("/admin/sessions")
    with contextlib.suppress(OSError):
        store.stat()
    grown = sum(file.stat().st_size for file in gateway.data.glob("gateway.db*")) - before
    return verdict(
        seen.in_bounds and len(listed.body) < 2**17 and grown < 2**20,
        seen,
        f"store +{grown >> 10} KB",
        f"list {len(listed.body) >> 10} KB",
    )


class _Refusing(Engine):
    """vLLM's 404 for a model that it does not serve."""

    def answer_chat(self, exchange: Exchange) -> None:
        """See FakeEngine."""
        if exchange.request.json.get("model") == MODEL:
            super().answer_chat(exchange)
        else:
            exchange.json({"error": {"message": "no such model", "code": 404}}, 404)


@TRIALS.add
def passwords_of_engines(ground: Ground) -> Verdict:
    """A password in engine_urls is refused, or shown to nobody"""
    engine = ground.engine()
    url = engine.url.replace("http://", "http://user:hunter2@")
    gateway = ground.idle(url)
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
    where = [name for name, text in zip(("502", "health", "session", "log"), shown, strict=True) if b"hunter2" in text]
    return verdict(not where, "shown in " + ", ".join(where) if where else "not shown")


def _respond(exchange: Exchange) -> None:
    """An answer of /v1/responses that repeats what was asked, under the id that was asked for."""
    asked = exchange.request.json
    text = {"type": "output_text", "text": str(asked.get("input")), "annotations": []}
    said = {"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": [text]}
    usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
    answer = {"id": "resp_fixed", "object": "response", "model": MODEL, "status": "completed", "output": [said]}
    exchange.json({**answer, "usage": usage})


@TRIALS.add
def ids_of_others(ground: Ground) -> Verdict:
    """A client that names its answer like that of another session does not replace it"""
    engine = ground.engine()
    engine.on_other = _respond
    gateway = ground.gateway(engine.url)
    for session, text in (("victim", "secret"), ("thief", "evil")):
        gateway.post(
            "/v1/responses",
            {"model": MODEL, "input": text, "request_id": "resp_fixed", "store": True},
            {"x-session-id": session},
        )
        gateway.get(f"/admin/sessions/{session}")
    kept = gateway.get("/v1/responses/resp_fixed")
    return first_false({"the first one stays, or the second is not taken": b"evil" not in kept.body}, f"{kept.status}")


@TRIALS.add
def keys_in_output(ground: Ground) -> Verdict:
    """The key is in neither the log nor the process list, and the engine does not get it"""
    engine = ground.engine()
    gateway = ground.before(engine, api_key=KEY, log_level="debug")
    gateway.chat("a", "x")
    gateway.get("/admin/windows/none")
    gateway.raw(head("GET", f"/admin/x?key={KEY}", f"authorization: Bearer {KEY}", "connection: close"))
    sent = any(KEY in value for request in engine.asked for _, value in request.headers)
    shown = KEY in gateway.log.replace(f"key={KEY}", "")
    return first_false({"not in the log": not shown, "not at the engine": not sent}, f"{len(engine.asked)} requests")
