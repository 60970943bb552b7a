"""Who is let in and what gets through: keys, pages of other sites, paths, fields that no client may send, salts."""

import json
from posixpath import normpath

from loadtests.attack_bodies import CHAT
from loadtests.attack_rig import KEY, Ground, Trials, Verdict, first_false, head, verdict
from tests.support.fakes.engine import MODEL

TRIALS = Trials()
_BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()


_DOORS = (
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/responses"), ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"), ("POST", "/v1/embeddings"), ("GET", "/v1/models"), ("POST", "/tokenize"),
    ("POST", "/detokenize"), ("GET", "/v1/responses/x"), ("POST", "/s/a/v1/chat/completions"), ("GET", "/metrics"),
    ("POST", "/w/a/v1/chat/completions"), ("GET", "/admin/sessions"), ("GET", "/admin/sessions/a"),
    ("DELETE", "/admin/sessions/a"), ("POST", "/admin/windows"), ("GET", "/admin/windows"), ("GET", "/admin/windows/a"),
    ("PATCH", "/admin/windows/a"), ("DELETE", "/admin/windows/a"), ("POST", "/admin/windows/a/thaw"),
    ("POST", "/admin/windows/a/clone"), ("POST", "/admin/windows/a/verify"), ("POST", "/admin/windows/a/prefetch"),
    ("POST", "/admin/windows/a/evict"), ("POST", "/admin/windows/a/ask"), ("GET", "/admin/windows/a/messages"),
    ("GET", "/admin/windows/a/export"), ("POST", "/admin/windows/import"), ("POST", "/admin/windows/a/fanout"),
    ("GET", "/admin/policies"), ("PUT", "/admin/policies"), ("POST", "/admin/policies/check"), ("GET", "/admin/cache"),
    ("GET", "/admin/health"), ("GET", "/admin/metrics"), ("POST", "/admin/doctor"), ("GET", "/admin/openapi.json"),
    ("GET", "/admin/tree"), ("POST", "/mcp"), ("GET", "/mcp"), ("DELETE", "/mcp"),
)  # fmt: skip


@TRIALS.add
def keys(ground: Ground) -> Verdict:
    """Without the right key no door does anything, however the key is sent"""
    engine = ground.engine()
    gateway = ground.before(engine, api_key=KEY)
    wrong = [
        "x-api-key: ", "x-api-key: attack", f"x-api-key: {KEY}x", f"x-api-key: x{KEY}", "authorization: Bearer",
        f"authorization: Basic {KEY}", f"authorization: Token {KEY}", f"proxy-authorization: Bearer {KEY}",
        f"cookie: x-api-key={KEY}", f"x-api-keys: {KEY}", f"x_api_key: {KEY}", f"authorization: Bearer {KEY.upper()}",
        f"x-api-key: {KEY},{KEY}", f"authorization: Bearer Bearer {KEY}", "x-api-key: \xff", "accept: */*",
    ]  # fmt: skip
    through: dict[str, bool] = {}
    for method, path in _DOORS:
        for header in wrong if path in (CHAT, "/admin/sessions", "/mcp") else wrong[-1:]:
            answer = gateway.raw(head(method, path, header, "connection: close", length=2) + b"{}")
            through[f"{method} {path} {header!r} is refused, not {answer.status}"] = answer.status in (
                0,
                400,
                401,
                404,
                405,
            )
    for path in (
        f"/admin/sessions?api_key={KEY}",
        f"/admin/sessions?x-api-key={KEY}",
        f"//{KEY}@127.0.0.1/admin/sessions",
    ):
        answer = gateway.raw(head("GET", path, "connection: close"))
        through[f"{path} is refused, not {answer.status}"] = answer.status in (400, 401, 404)
    right = gateway.raw(head("GET", "/admin/sessions", f"authorization: bearer  {KEY}", "connection: close"))
    through[f"the right key is let in, not {right.status}"] = right.status == 200
    through["the engine was asked nothing"] = not engine.asked
    through["the key is in no log"] = KEY not in gateway.log
    return first_false(through)


@TRIALS.add
def pages_of_other_sites(ground: Ground) -> Verdict:
    """Without a key, no page of another site gets anything done: /admin, /mcp, and /v1 too"""
    engine = ground.engine()
    gateway = ground.before(engine)
    gateway.chat("mine")
    engine.requests.clear()
    foreign = {
        "text/plain": ["content-type: text/plain", "origin: http://evil.example"],
        "origin null": ["origin: null"],
        "foreign origin": ["origin: http://evil.example"],
        "other port": ["origin: http://127.0.0.1:1"],
        "cross-site": ["sec-fetch-site: cross-site"],
        "same-site": ["sec-fetch-site: same-site"],
    }
    wanted = {}
    for method, path in _DOORS:
        body = _BODY if path.startswith(("/v1", "/s/", "/w/")) and method == "POST" else b"{}"
        for name, headers in foreign.items():
            answer = gateway.raw(head(method, path, *headers, "connection: close", length=len(body)) + body)
            wanted[f"{name}: {method} {path} is refused, not {answer.status}"] = answer.status in (403, 405, 415)
    for name in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example"):
        raw = f"GET /admin/sessions HTTP/1.1\r\nhost: {name}\r\nconnection: close\r\n\r\n".encode()
        wanted[f"host {name} is refused"] = gateway.raw(raw).status == 403
    preflight = gateway.raw(
        head("OPTIONS", CHAT, *foreign["foreign origin"], "access-control-request-method: POST", "connection: close")
    )
    wanted["no preflight is granted"] = "access-control-allow-origin" not in preflight.headers
    wanted[f"the engine was asked nothing, not {len(engine.asked)} times"] = not engine.asked
    wanted["mine is still there"] = gateway.get("/admin/sessions/mine").status == 200
    return first_false(wanted)


@TRIALS.add
def permissions_of_an_engine(ground: Ground) -> Verdict:
    """An engine that lets every page read it does not make us readable where no key is set"""
    engine = ground.engine()
    open_ = ("access-control-allow-origin: *", "access-control-allow-credentials: true")
    engine.on_other = lambda exchange: exchange.json({}, headers=open_)
    engine.on_chat = lambda exchange: exchange.json({"choices": []}, headers=open_)
    gateway = ground.before(engine)
    answers = [gateway.chat("a"), gateway.post("/v1/embeddings", {"model": MODEL, "input": "a"})]
    return verdict(
        all("access-control-allow-origin" not in answer.headers for answer in answers),
        *(f"{answer.status} {sorted(set(answer.headers) & {'access-control-allow-origin'})}" for answer in answers),
    )


_SPELLINGS = (
    "/metrics", "/reset_prefix_cache", "/sleep", "/v1/../reset_prefix_cache", "/v1/%2e%2e/sleep",
    "/v1/..%2fsleep", "/v1/%2e%2e%2fsleep", "/v1/%252e%252e/sleep", "/v1//../sleep", "/v1/./../sleep", "/v1/..;/sleep",
    "/v1\\..\\sleep", "/v1/..%5csleep", "/s/a/v1/../sleep", "/s/a/../sleep", "/w/a/../sleep", "/s/a/s/b/sleep",
    "/s/%2e%2e/sleep", "//v1/../sleep", "/V1/sleep", "/v1%00/../sleep", "/v1/..%00/sleep", "/tokenize/../sleep",
    "/v1/.%2e/sleep", "/v1/%2E./sleep", "/v1/..%c0%afsleep", "/v1/..%ef%bc%8fsleep",
)  # fmt: skip
_NOT_LISTED = (
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/some_future_endpoint", "/v1/files", "/v1/fine_tuning/jobs",
    "/v1/collective_rpc", "/v1/sleep", "/v1/wake_up", "/v1/realtime", "/v1/load_lora_adapter/",
    "/v1/%6coad_lora_adapter",
)  # fmt: skip


@TRIALS.add
def paths(ground: Ground) -> Verdict:
    """No spelling of a path reaches a door of the engine beside /v1, and no completion gets past its salt"""
    engine = ground.engine()
    gateway = ground.before(engine)
    for path in _SPELLINGS:
        for method in ("GET", "POST"):
            gateway.raw(head(method, path, "connection: close", length=2) + b"{}")
    wrong = [f"NOT {r.method} {r.target}" for r in engine.asked if not normpath(r.path).startswith(("/v1/", "/tok"))]
    engine.requests.clear()
    spelled = ("/v1/chat/completions/", "/v1/%63hat/completions", "/v1/chat%2fcompletions", "/v1/chat/completions?x=1")
    for path in (*spelled, "/v1//chat/completions", "/v1/chat//completions", "/v1/CHAT/completions"):
        gateway.raw(head("POST", path, "connection: close", length=len(_BODY)) + _BODY)
    wrong += [f"NOT salted: {r.target}" for r in engine.asked if r.path == CHAT and not r.json.get("cache_salt")]
    return verdict(not wrong, *wrong, f"{len(_SPELLINGS) * 2} spellings, {len(engine.asked)} turns salted")


@TRIALS.add
def allow_list(ground: Ground) -> Verdict:
    """What is not listed under /v1 does not pass, by any method"""
    engine = ground.engine()
    engine.on_other = lambda exchange: exchange.json({})
    gateway = ground.before(engine)
    for path in _NOT_LISTED:
        for method in ("GET", "POST", "DELETE", "PUT"):
            gateway.raw(head(method, path, "connection: close", length=2) + b"{}")
    passed = sorted({f"{r.method} {r.target}" for r in engine.asked})
    return verdict(not passed, f"{len(passed)} of {len(_NOT_LISTED) * 4} passed", *passed[:4])


@TRIALS.add
def private_fields(ground: Ground) -> Verdict:
    """What a client may not say does not get to the engine: salts, transfers, ranks, request ids"""
    engine = ground.engine()
    engine.on_other = lambda exchange: exchange.json({})
    gateway = ground.before(engine)
    body = (
        b'{"model":"demo","messages":[{"role":"user","content":"hi"}],"input":"a","cache_salt":"mine","cache\\u005fsalt":"mine",'
        b'"kv_transfer_params":{"do_remote_decode":true},"ec_transfer_params":{"a":"mine"},"request_id":"mine","priority":-9,'
        b'"vllm_xargs":{"cache_salt":"mine"},"cache_salt":"mine"}'
    )
    headers = ["x-data-parallel-rank: 1", "x-session-id: a", "connection: close"]
    for path in (CHAT, "/v1/embeddings", "/v1/chat/completions/batch"):
        gateway.raw(head("POST", path, *headers, length=len(body)) + body)
    wrong: set[str] = set()
    for request in engine.asked:
        sent = request.json
        wrong |= {f"NOT {request.path}: {name}" for name in _PRIVATE if name in sent}
        wrong |= {f"NOT {request.path}: its salt" for _ in [0] if sent.get("cache_salt") == "mine"}
        wrong |= {f"NOT {request.path}: {name}" for name in ("x-data-parallel-rank",) if request.header(name)}
    return verdict(not wrong and bool(engine.asked), *sorted(wrong), f"{len(engine.asked)} requests seen")


_PRIVATE = ("kv_transfer_params", "ec_transfer_params", "request_id", "priority")


@TRIALS.add
def anonymous_salts(ground: Ground) -> Verdict:
    """Two anonymous clients share no salt at the endpoints that pass through"""
    engine = ground.engine()
    engine.on_other = lambda exchange: exchange.json({})
    gateway = ground.before(engine)
    for user in ("a", "b"):
        for path in ("/v1/chat/completions/batch", "/v1/embeddings"):
            gateway.post(
                path, {"model": MODEL, "input": "x", "messages": [[{"role": "user", "content": "x"}]], "user": user}
            )
    salts = [r.json.get("cache_salt") for r in engine.asked]
    return verdict(
        len(set(salts)) == len(salts) == 4 and all(salts), f"{len(set(salts))} salts of {len(salts)} requests"
    )
