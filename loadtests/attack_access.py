"""Access control: keys, cross-site requests, path spellings, reserved fields and salts."""

import json
from posixpath import normpath

from loadtests.attack_bodies import CHAT
from loadtests.attack_harness import KEY, Testbed, Trials, Verdict, check_all, head, verdict
from tests.support.fakes.engine import MODEL

TRIALS = Trials()
_BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()


_ENDPOINTS = (
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
def api_keys(testbed: Testbed) -> Verdict:
    """Without the right key no endpoint does anything, however the key is sent"""
    engine = testbed.engine()
    gateway = testbed.gateway_in_front_of(engine, api_key=KEY)
    wrong_headers = [
        "x-api-key: ", "x-api-key: attack", f"x-api-key: {KEY}x", f"x-api-key: x{KEY}", "authorization: Bearer",
        f"authorization: Basic {KEY}", f"authorization: Token {KEY}", f"proxy-authorization: Bearer {KEY}",
        f"cookie: x-api-key={KEY}", f"x-api-keys: {KEY}", f"x_api_key: {KEY}", f"authorization: Bearer {KEY.upper()}",
        f"x-api-key: {KEY},{KEY}", f"authorization: Bearer Bearer {KEY}", "x-api-key: \xff", "accept: */*",
    ]  # fmt: skip
    checks: dict[str, bool] = {}
    for method, path in _ENDPOINTS:
        for header in wrong_headers if path in (CHAT, "/admin/sessions", "/mcp") else wrong_headers[-1:]:
            answer = gateway.send_raw(head(method, path, header, "connection: close", length=2) + b"{}")
            refused = answer.status in (0, 400, 401, 404, 405)
            checks[f"{method} {path} {header!r} is refused, not {answer.status}"] = refused
    for path in (
        f"/admin/sessions?api_key={KEY}",
        f"/admin/sessions?x-api-key={KEY}",
        f"//{KEY}@127.0.0.1/admin/sessions",
    ):
        answer = gateway.send_raw(head("GET", path, "connection: close"))
        checks[f"{path} is refused, not {answer.status}"] = answer.status in (400, 401, 404)
    right = gateway.send_raw(head("GET", "/admin/sessions", f"authorization: bearer  {KEY}", "connection: close"))
    checks[f"the right key is accepted, not {right.status}"] = right.status == 200
    checks["the engine got no request"] = not engine.asked
    checks["the key is in no log"] = KEY not in gateway.log
    return check_all(checks)


@TRIALS.add
def cross_site_requests(testbed: Testbed) -> Verdict:
    """Without a key, no page of another site can act on /admin, /mcp or /v1"""
    engine = testbed.engine()
    gateway = testbed.gateway_in_front_of(engine)
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
    checks = {}
    for method, path in _ENDPOINTS:
        body = _BODY if path.startswith(("/v1", "/s/", "/w/")) and method == "POST" else b"{}"
        for name, headers in foreign.items():
            answer = gateway.send_raw(head(method, path, *headers, "connection: close", length=len(body)) + body)
            checks[f"{name}: {method} {path} is refused, not {answer.status}"] = answer.status in (403, 405, 415)
    for name in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example"):
        raw = f"GET /admin/sessions HTTP/1.1\r\nhost: {name}\r\nconnection: close\r\n\r\n".encode()
        checks[f"host {name} is refused"] = gateway.send_raw(raw).status == 403
    preflight = gateway.send_raw(
        head("OPTIONS", CHAT, *foreign["foreign origin"], "access-control-request-method: POST", "connection: close")
    )
    checks["no preflight is granted"] = "access-control-allow-origin" not in preflight.headers
    checks[f"the engine got no request, not {len(engine.asked)}"] = not engine.asked
    checks["the session is still there"] = gateway.get("/admin/sessions/mine").status == 200
    return check_all(checks)


@TRIALS.add
def engine_cors_headers(testbed: Testbed) -> Verdict:
    """An engine's permissive CORS headers do not open a gateway that has no key"""
    engine = testbed.engine()
    cors_headers = ("access-control-allow-origin: *", "access-control-allow-credentials: true")
    engine.on_other = lambda exchange: exchange.json({}, headers=cors_headers)
    engine.on_chat = lambda exchange: exchange.json({"choices": []}, headers=cors_headers)
    gateway = testbed.gateway_in_front_of(engine)
    answers = [gateway.chat("a"), gateway.post("/v1/embeddings", {"model": MODEL, "input": "a"})]
    return verdict(
        all("access-control-allow-origin" not in answer.headers for answer in answers),
        *(f"{answer.status} {sorted(set(answer.headers) & {'access-control-allow-origin'})}" for answer in answers),
    )


_OUTSIDE_V1 = (
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
def path_spellings(testbed: Testbed) -> Verdict:
    """No path spelling reaches an engine endpoint outside /v1, and no completion avoids its salt"""
    engine = testbed.engine()
    gateway = testbed.gateway_in_front_of(engine)
    for path in _OUTSIDE_V1:
        for method in ("GET", "POST"):
            gateway.send_raw(head(method, path, "connection: close", length=2) + b"{}")
    failures = [f"NOT {r.method} {r.target}" for r in engine.asked if not normpath(r.path).startswith(("/v1/", "/tok"))]
    engine.requests.clear()
    spelled = ("/v1/chat/completions/", "/v1/%63hat/completions", "/v1/chat%2fcompletions", "/v1/chat/completions?x=1")
    for path in (*spelled, "/v1//chat/completions", "/v1/chat//completions", "/v1/CHAT/completions"):
        gateway.send_raw(head("POST", path, "connection: close", length=len(_BODY)) + _BODY)
    failures += [f"NOT salted: {r.target}" for r in engine.asked if r.path == CHAT and not r.json.get("cache_salt")]
    return verdict(not failures, *failures, f"{len(_OUTSIDE_V1) * 2} spellings, {len(engine.asked)} turns salted")


@TRIALS.add
def allow_list(testbed: Testbed) -> Verdict:
    """What is not on the allow list under /v1 is not forwarded, by any method"""
    engine = testbed.engine()
    engine.on_other = lambda exchange: exchange.json({})
    gateway = testbed.gateway_in_front_of(engine)
    for path in _NOT_LISTED:
        for method in ("GET", "POST", "DELETE", "PUT"):
            gateway.send_raw(head(method, path, "connection: close", length=2) + b"{}")
    passed = sorted({f"{r.method} {r.target}" for r in engine.asked})
    return verdict(not passed, f"{len(passed)} of {len(_NOT_LISTED) * 4} passed", *passed[:4])


@TRIALS.add
def private_fields(testbed: Testbed) -> Verdict:
    """Fields reserved to the gateway never reach the engine: salts, transfers, ranks, request ids"""
    engine = testbed.engine()
    engine.on_other = lambda exchange: exchange.json({})
    gateway = testbed.gateway_in_front_of(engine)
    body = (
        b'{"model":"demo","messages":[{"role":"user","content":"hi"}],"input":"a","cache_salt":"mine","cache\\u005fsalt":"mine",'
        b'"kv_transfer_params":{"do_remote_decode":true},"ec_transfer_params":{"a":"mine"},"request_id":"mine","priority":-9,'
        b'"vllm_xargs":{"cache_salt":"mine"},"cache_salt":"mine"}'
    )
    headers = ["x-data-parallel-rank: 1", "x-session-id: a", "connection: close"]
    for path in (CHAT, "/v1/embeddings", "/v1/chat/completions/batch"):
        gateway.send_raw(head("POST", path, *headers, length=len(body)) + body)
    failures: set[str] = set()
    for request in engine.asked:
        sent = request.json
        failures |= {f"NOT {request.path}: {name}" for name in _PRIVATE if name in sent}
        failures |= {f"NOT {request.path}: the client's salt" for _ in [0] if sent.get("cache_salt") == "mine"}
        failures |= {f"NOT {request.path}: {name}" for name in ("x-data-parallel-rank",) if request.header(name)}
    return verdict(not failures and bool(engine.asked), *sorted(failures), f"{len(engine.asked)} requests")


_PRIVATE = ("kv_transfer_params", "ec_transfer_params", "request_id", "priority")


@TRIALS.add
def anonymous_salts(testbed: Testbed) -> Verdict:
    """Two anonymous clients share no salt at the pass-through endpoints"""
    engine = testbed.engine()
    engine.on_other = lambda exchange: exchange.json({})
    gateway = testbed.gateway_in_front_of(engine)
    for user in ("a", "b"):
        for path in ("/v1/chat/completions/batch", "/v1/embeddings"):
            gateway.post(
                path, {"model": MODEL, "input": "x", "messages": [[{"role": "user", "content": "x"}]], "user": user}
            )
    salts = [r.json.get("cache_salt") for r in engine.asked]
    return verdict(
        len(set(salts)) == len(salts) == 4 and all(salts), f"{len(set(salts))} salts of {len(salts)} requests"
    )
