"""What no request may do to the others: stop the event loop, take memory beyond its body, or last for ever."""

import json
from collections.abc import Iterator

import httpx
import pytest

from gateway.api import server
from gateway.api.asgi import MAX_PARAMETERS
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine, delta
from tests.support.gateway_process import Gateway, eventually, gateway_in_front_of
from tests.support.raw_http import RawHttpClient

CHAT = "/v1/chat/completions"
MB = 2**20
SMALL = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
STREAM = SMALL[:-1] + b',"stream":true}'


def code_of(response: httpx.Response) -> tuple[int, str]:
    """Status and code of an error in any shape."""
    return response.status_code, response.json()["error"]["code"]


def post(gateway: Gateway, path: str, body: bytes, **headers: str) -> httpx.Response:
    """Send a JSON body."""
    return gateway.http.post(path, content=body, headers={"content-type": "application/json", **headers})


@pytest.fixture(scope="module")
def limited(shared_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with bounds that a test reaches at once."""
    folder = tmp_path_factory.mktemp("limited")
    with gateway_in_front_of(
        shared_engine.url, folder, max_messages=20, max_json_values=1000, body_timeout_s=1, client_timeout_s=5,
        extra_paths="POST /v1/extra,GET /v1/below/*,* /v1/any", allowed_origins="https://mine.example",
    ) as gateway:  # fmt: skip
        yield gateway


# --- queries


def test_a_query_of_many_parameters_is_refused_before_it_is_parsed(gateway: Gateway) -> None:
    query = "&".join(f"a{number}" for number in range(15_000))
    for path in ("/admin/sessions", "/admin/windows", "/v1/responses/resp_1/input_items"):
        assert code_of(gateway.http.get(f"{path}?{query[:60_000]}")) == (413, "too_complex")
        assert code_of(gateway.http.get(f"{path}?{'&' * MAX_PARAMETERS}")) == (413, "too_complex")
    tags = "&".join(["tags=a"] * 20)
    assert gateway.http.get(f"/admin/windows?{tags}").status_code == 200


def test_a_parameter_given_twice_is_named_and_shown_shortly(gateway: Gateway) -> None:
    answer = gateway.http.get(f"/admin/sessions?limit=1&{'é' * 3000}=1&{'é' * 3000}=2")
    assert code_of(answer) == (400, "invalid_request")
    assert len(answer.text) < 1000


# --- JSON


@pytest.mark.parametrize(
    "path", [CHAT, "/v1/messages", "/v1/responses", "/v1/completions", "/v1/embeddings", "/tokenize"]
)
@pytest.mark.parametrize("value", ["[" * 101 + "]" * 101, "[" * 900 + "]" * 900, "[" + "1," * 2000 + "1]"])
def test_json_beyond_the_bounds_reaches_no_engine(engine: FakeEngine, limited: Gateway, path: str, value: str) -> None:
    body = SMALL[:-1] + b',"metadata":' + value.encode() + b"}"
    answer = post(limited, path, body)
    assert answer.status_code == 413
    assert b"too_complex" in answer.content
    assert engine.asked == []


def test_more_messages_than_the_bound_are_refused(engine: FakeEngine, limited: Gateway) -> None:
    def sent(count: int) -> httpx.Response:
        return limited.http.post(CHAT, json={"model": MODEL, "messages": [{"role": "user", "content": "x"}] * count})

    assert sent(20).status_code == 200
    assert code_of(sent(21)) == (413, "too_complex")
    results = [{"type": "tool_result", "tool_use_id": "a", "content": "x"}] * 21  # each becomes a message
    body = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": results}]}
    assert limited.http.post("/v1/messages", json=body).json()["error"]["code"] == "too_complex"


@pytest.mark.parametrize("path", ["/admin/windows", "/admin/policies/check", "/mcp"])
def test_json_beyond_the_bounds_is_refused_by_the_other_apis_too(gateway: Gateway, path: str) -> None:
    accept = {"accept": "application/json, text/event-stream"}
    deep = b'{"session_id":' + b'{"a":' * 990 + b"1" + b"}" * 990 + b"}"
    assert code_of(post(gateway, path, deep, **accept)) == (413, "too_complex")
    assert code_of(post(gateway, path, b'{"' + b"a" * MB + b'":1}', **accept)) == (413, "payload_too_large")


def test_values_of_any_kind_are_refused_in_few_words(gateway: Gateway) -> None:
    deep = "[" * 99 + "]" * 99
    for field in ("session_id", "window_name", "description", "tags", "ttl_seconds"):
        given = {"session_id": '"s"', "window_name": '"w"', field: deep}
        body = "{" + ",".join(f'"{name}":{value}' for name, value in given.items()) + "}"
        answer = post(gateway, "/admin/windows", body.encode())
        assert answer.status_code == 400
        assert len(answer.content) < 1000
    unknown = post(gateway, "/admin/windows", b'{"' + b"a" * 500_000 + b'":1}')
    assert code_of(unknown) == (400, "unknown_parameter")
    assert len(unknown.content) < 1000


def test_a_large_turn_is_answered_while_its_body_is_looked_at_and_recorded(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    messages = [{"role": role, "content": f"{n} " * 200} for n in range(2000) for role in ("user", "assistant")]
    messages.append({"role": "user", "content": "x" * 2 * MB})
    body = json.dumps({"model": MODEL, "messages": messages}).encode()
    first = post(gateway, CHAT, body)
    assert first.status_code == 200
    sent = engine.seen(CHAT)[0].json
    assert sent["messages"] == messages
    known = first.headers["x-session-id"]
    assert len(gateway.turns(known)) == 1
    messages += [{"role": "assistant", "content": "Hello there!"}, {"role": "user", "content": "and then?"}]
    again = gateway.http.post(CHAT, json={"model": MODEL, "messages": messages})
    assert again.headers["x-session-id"] == known


# --- heads


def refused_head(gateway: Gateway, sent: bytes) -> bytes:
    """The answer to a head beyond the limits."""
    with RawHttpClient(gateway.url) as wire:
        wire.send(sent)
        return wire.rest()


def test_a_head_that_comes_at_once_has_the_same_bounds(gateway: Gateway) -> None:
    many = b"".join(b"x-%d: y\r\n" % number for number in range(server.MAX_HEADERS + 1))
    for sent in (many, b"x: " + b"y" * (server.MAX_HEAD_BYTES + 1) + b"\r\n"):
        answer = refused_head(gateway, b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + sent + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 431 ")
    fits = b"x: " + b"y" * 60_000 + b"\r\n"
    with RawHttpClient(gateway.url) as wire:
        wire.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + fits + b"\r\n")
        assert wire.head() == 200


def test_a_large_body_does_not_count_towards_the_head_limit(engine: FakeEngine, gateway: Gateway) -> None:
    text = "x" * 300_000
    with RawHttpClient(gateway.url) as wire:
        for _ in range(3):
            wire.post(CHAT, json.dumps({"model": MODEL, "messages": [{"role": "user", "content": text}]}).encode())
            assert wire.head() == 200
            wire.body()
    assert [request.json["messages"][0]["content"] for request in engine.seen(CHAT)] == [text] * 3


def streaming(exchange: Exchange) -> None:
    """An engine whose stream does not end."""
    exchange.begin()
    exchange.chunk(delta(content="one"))
    exchange.gone()


@pytest.mark.parametrize("line", [b"a:b\r\n", b"y" * 1000])
def test_a_second_head_behind_a_stream_is_bounded(engine: FakeEngine, gateway: Gateway, line: bytes) -> None:
    engine.on_chat = streaming
    before = gateway.memory
    with RawHttpClient(gateway.url) as wire:
        wire.post(CHAT, STREAM)
        wire.head()
        wire.chunk()
        wire.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: ")
        with pytest.raises(OSError, match=r"reset|pipe"):
            wire.send(line * (8 * MB // len(line)))
    assert gateway.memory - before < 16 * MB


def test_a_second_head_in_small_pieces_is_bounded_too(engine: FakeEngine, gateway: Gateway) -> None:
    engine.on_chat = streaming

    def drip(wire: RawHttpClient) -> None:
        for _ in range(20):
            wire.send(b"y" * 20_000)
            gateway.http.get("/healthz")  # by now the gateway has read it

    with RawHttpClient(gateway.url) as wire:
        wire.post(CHAT, STREAM)
        wire.head()
        wire.chunk()
        wire.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: ")
        with pytest.raises(OSError, match=r"reset|pipe"):
            drip(wire)


def test_only_so_many_requests_wait_for_the_answer_before_them(engine: FakeEngine, gateway: Gateway) -> None:
    engine.on_chat = streaming
    with RawHttpClient(gateway.url) as wire:
        wire.post(CHAT, STREAM)
        wire.head()
        wire.chunk()
        wire.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n" * (server.MAX_PIPELINED + 2))
        with pytest.raises(AssertionError, match="closed between two chunks"):
            wire.chunks()


def test_trailers_are_not_taken_for_headers(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    with RawHttpClient(gateway.url) as wire:
        wire.send(
            HEAD
            + b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\nx-session-id: %s\r\nx-odd: 1\r\n\r\n"
            % (len(SMALL), SMALL, session.encode())
        )
        assert wire.head() == 200
        assert wire.headers["x-session-id"] != session
    (request,) = engine.seen(CHAT)
    assert request.header("x-odd") == []


def test_trailers_without_end_are_bounded(gateway: Gateway) -> None:
    before = gateway.memory
    with RawHttpClient(gateway.url) as wire:
        wire.send(HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
        with pytest.raises(OSError, match=r"reset|pipe"):
            wire.send(b"a:b\r\n" * (8 * MB // 5))
    assert gateway.memory - before < 16 * MB


def test_a_body_that_drips_for_ever_is_given_up(limited: Gateway) -> None:
    with RawHttpClient(limited.url) as wire:
        wire.send(HEAD + b"content-length: 100000\r\n\r\n")

        def dripped() -> bool:
            wire.send(b" ")
            return wire.readable()

        eventually(dripped, "an answer")
        assert (wire.head(), wire.json()["error"]["code"]) == (408, "request_timeout")


def test_a_client_of_http_1_0_gets_no_chunks(engine: FakeEngine, gateway: Gateway) -> None:
    for body in (SMALL, STREAM):
        with RawHttpClient(gateway.url) as wire:
            wire.send(HEAD.replace(b"1.1", b"1.0") + b"content-length: %d\r\n\r\n%s" % (len(body), body))
            answer = wire.rest()
        head, _, rest = answer.partition(b"\r\n\r\n")
        assert b"connection: close" in head
        assert b"transfer-encoding" not in head
        assert rest.endswith(b"data: [DONE]\n\n") if body is STREAM else json.loads(rest)["choices"]


# --- pages of other sites


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/admin/sessions"), ("POST", "/tokenize"), ("POST", "/mcp")],
)
def test_without_a_key_pages_of_other_sites_are_refused(
    engine: FakeEngine, gateway: Gateway, headers: dict[str, str], method: str, path: str
) -> None:
    sent = (
        {"content": SMALL, "headers": {"content-type": "application/json", **headers}}
        if method == "POST"
        else {"headers": headers}
    )
    answer = gateway.http.request(method, path, **sent)  # type: ignore[arg-type]
    assert code_of(answer) == (403, "forbidden")
    assert "allowed_origins" in answer.text
    assert engine.asked == []


@pytest.mark.parametrize("headers", [{}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}])
def test_ones_own_pages_and_programs_are_served(gateway: Gateway, headers: dict[str, str]) -> None:
    assert gateway.http.get("/v1/models", headers=headers).status_code == 200
    assert gateway.http.get("/admin/sessions", headers=headers).status_code == 200
    assert gateway.http.get("/v1/models", headers={"origin": gateway.url, **headers}).status_code == 200


def test_a_page_that_is_allowed_is_served(limited: Gateway) -> None:
    page = {"origin": "https://mine.example", "sec-fetch-site": "cross-site"}
    assert limited.http.get("/v1/models", headers=page).status_code == 200
    assert limited.http.get("/v1/models", headers={**page, "origin": "https://mine.example.evil"}).status_code == 403


def test_a_page_that_is_allowed_reads_answers_after_a_preflight(limited: Gateway, engine: FakeEngine) -> None:
    page = {"origin": "https://mine.example"}
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    preflight = limited.http.options(CHAT, headers={**page, **wanted})
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, page["origin"])
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    for body in (SMALL, STREAM):
        answer = post(limited, CHAT, body, **page)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, page["origin"])
        assert "x-session-id" in answer.headers["access-control-expose-headers"]
    other = limited.http.options(CHAT, headers={"origin": "https://evil.example", **wanted})
    assert "access-control-allow-origin" not in other.headers
    assert len(engine.seen(CHAT)) == 2


@pytest.mark.parametrize(
    "kind", [b"text/plain", b"text/plain;application/json", b"application/x-www-form-urlencoded", b""]
)
@pytest.mark.parametrize(
    "path", [CHAT, "/v1/messages", "/v1/responses", "/v1/completions", "/v1/messages/count_tokens", "/v1/embeddings"]
)
def test_a_body_has_to_say_that_it_is_json(engine: FakeEngine, gateway: Gateway, path: str, kind: bytes) -> None:
    with RawHttpClient(gateway.url) as wire:
        wire.post(path, SMALL, f"content-type: {kind.decode()}")
        assert wire.head() == 400
        assert "content-type" in wire.json()["error"]["message"]
    assert engine.asked == []


def test_json_may_name_its_charset(gateway: Gateway) -> None:
    answer = gateway.http.post(CHAT, content=SMALL, headers={"content-type": "Application/JSON; charset=utf-8"})
    assert answer.status_code == 200


# --- the rest of the engine's API


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("POST", "/v1/load_lora_adapter", "not_found"), ("POST", "/v1/unload_lora_adapter", "not_found"),
        ("GET", "/v1/files", "not_found"), ("GET", "/v1/brand/new", "not_found"), ("GET", "/s/a/v1/new", "not_found"),
        ("POST", "/v1/load%5Flora_adapter/", "not_found"), ("GET", "/v1/responses/x/new", "not_found"),
        ("GET", CHAT, "method_not_allowed"), ("DELETE", "/v1/models/demo", "method_not_allowed"),
        ("PUT", "/v1/embeddings", "method_not_allowed"), ("OPTIONS", CHAT, "method_not_allowed"),
        ("GET", "/tokenize", "method_not_allowed"),
    ],
)  # fmt: skip
def test_what_is_not_on_the_list_reaches_no_engine(
    engine: FakeEngine, gateway: Gateway, method: str, path: str, code: str
) -> None:
    answer = gateway.http.request(method, path)
    assert answer.json()["error"]["code"] == code
    assert engine.asked == []


def test_what_a_setting_names_passes_and_its_bodies_are_salted(engine: FakeEngine, limited: Gateway) -> None:
    engine.on_other = lambda exchange: exchange.json({"reached": exchange.request.target})
    for method, path in (
        ("POST", "/v1/extra"),
        ("GET", "/v1/below/x/y"),
        ("PUT", "/v1/any"),
        ("POST", "/s/a/v1/extra"),
    ):
        answer = limited.http.request(method, path, json={"cache_salt": "mine"} if method == "POST" else None)
        assert answer.json() == {"reached": path.removeprefix("/s/a")}
    salts = [request.json["cache_salt"] for request in engine.asked if request.method == "POST"]
    assert len(salts) == 2
    assert "mine" not in salts
    for method, path in (("GET", "/v1/extra"), ("POST", "/v1/below/x"), ("GET", "/v1/below")):
        assert limited.http.request(method, path).status_code in (404, 405)


def test_what_steers_the_engine_is_taken_out_of_body_and_head(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    private = {"ec_transfer_params": {"a": 1}, "kv_transfer_params": {"a": 1}, "priority": 1, "request_id": "a"}
    gateway.chat(session, headers={"x-data-parallel-rank": "1"}, **private)
    (request,) = engine.seen(CHAT)
    assert private.keys() & request.json.keys() == set()
    assert request.header("x-data-parallel-rank") == []


def test_an_engine_open_to_every_page_does_not_open_the_gateway(engine: FakeEngine, gateway: Gateway) -> None:
    engine.on_models = lambda exchange: exchange.json(
        {"object": "list", "data": []}, 200, ["access-control-allow-origin: *"]
    )
    assert "access-control-allow-origin" not in gateway.http.get("/v1/models").headers


def test_nothing_sent_can_forge_a_line_of_the_log(gateway: Gateway) -> None:
    for path in ("/v1/x%0a2026-11-30 CRITICAL gateway.app: forged%1b[31m", "/admin/x%0aforged"):
        gateway.http.get(path)
        post(gateway, path, b'{"cache_salt":' + b"[" * 1000 + b"]" * 1000 + b"}")
    assert "\nforged" not in gateway.log
    assert "\x1b" not in gateway.log


def test_odd_tools_cost_no_traceback(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    odd = {"role": "assistant", "content": "x", "tool_calls": True}
    gateway.chat(session, tools=True)
    gateway.chat(session, messages=[{"role": "user", "content": "x"}, odd, {"role": "user", "content": "y"}], tools=7)
    assert len(gateway.turns(session, 2)) == 2
    assert "could not review" not in gateway.log


def test_a_client_cannot_choose_the_id_of_an_answer(engine: FakeEngine, gateway: Gateway, session: str) -> None:
    body = {"model": MODEL, "input": "hi", "request_id": "resp_of_somebody_else"}
    gateway.http.post("/v1/responses", json=body, headers={"x-session-id": session})
    (request,) = engine.seen("/v1/responses")
    assert "request_id" not in request.json
