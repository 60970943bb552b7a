"""The page over HTTP: its files, their headers, the plain list, and what they give to whom."""

import html
import re
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest

from gateway.api.page import plain
from gateway.api.page.files import load
from tests.support.admin_requests import freeze
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import Gateway, gateway_in_front_of

KEY = "correct-horse-battery"
MARKUP = '<script>alert(1)</script><img src=x onerror=alert(1)> & "quoted" \u202etxet\u202c \x07'


@pytest.fixture(scope="module")
def guarded(shared_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with a key, and a client without it."""
    with gateway_in_front_of(shared_engine.url, tmp_path_factory.mktemp("guarded"), api_key=KEY) as gateway:
        del gateway.http.headers["x-api-key"]
        yield gateway


def test_the_page_is_served_at_the_root_with_a_strict_policy(gateway: Gateway) -> None:
    answer = gateway.http.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_every_file_has_its_type_and_is_not_sent_twice(gateway: Gateway) -> None:
    for name, file in load().items():
        answer = gateway.http.get(f"/ui/{name}")
        assert (answer.status_code, answer.content) == (200, file.body), name
        assert answer.headers["content-type"] == file.content_type
        assert answer.headers["cache-control"] == "no-cache"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        for known in (answer.headers["etag"], "W/" + answer.headers["etag"], '"other", ' + answer.headers["etag"]):
            again = gateway.http.get(f"/ui/{name}", headers={"if-none-match": known})
            assert (again.status_code, again.content) == (304, b"")
    assert gateway.http.head("/").content == b""


def test_nothing_else_is_served_below_it(gateway: Gateway) -> None:
    for path in ("/ui/", "/ui", "/ui/views", "/ui/none.js", "/ui/../app.py", "/ui/%2e%2e/files.py", "/ui/views/%00"):
        answer = gateway.http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
    assert gateway.http.post("/").json()["error"]["code"] == "method_not_allowed"


def test_the_page_has_no_inline_script_and_no_address_of_another_host() -> None:
    for name, file in load().items():
        text = file.body.decode()
        assert not re.search(r"(https?:)?//[a-z]", text.replace("http://www.w3.org/2000/svg", "")), name
        assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function)\b", text), name
    index = load()["index.html"].body.decode()
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|<style", index)
    assert not re.search(r'(?:href|src|url)="?/', index), "an absolute path leads out of a proxy's path"


def test_its_files_need_no_key_and_tell_nothing(guarded: Gateway) -> None:
    for path in ("/", "/ui/main.js", "/ui/page.css"):
        assert guarded.http.get(path).status_code == 200
    refused = guarded.http.get("/ui/plain")
    assert refused.status_code == 401
    assert "asks for a key" in refused.text


def test_the_plain_list_has_windows_and_sessions_without_scripts(gateway: Gateway, session: str) -> None:
    freeze(gateway, session, f"w-{session}", description="the plan", tags=["a-tag"])
    answer = gateway.http.get("/ui/plain")
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    for text in (f"w-{session}", "the plan", "a-tag", session, "Windows (", "Sessions ("):
        assert text in answer.text
    assert "<script" not in answer.text


def test_the_plain_list_escapes_whatever_it_shows(gateway: Gateway, session: str) -> None:
    freeze(gateway, session, f"w-{session}", description=MARKUP)
    text = gateway.http.get("/ui/plain").text
    assert html.escape('<script>alert(1)</script><img src=x onerror=alert(1)> & "quoted" [U+202E]txet') in text
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(text)
    assert {"script", "img"}.isdisjoint(tags)
    assert not re.search("[\x00-\x08\u202a-\u202e]", text)


def test_the_plain_list_is_paged(gateway: Gateway, session: str) -> None:
    freeze(gateway, session, f"w-{session}")
    first = gateway.http.get("/ui/plain?offset=0").text
    beyond = gateway.http.get("/ui/plain?offset=100000").text
    assert f"w-{session}" in first
    assert f"w-{session}" not in beyond
    assert "rel=prev" in beyond
    for wrong in ("-1", "x", "1" * 30, "0" * 12 + "9" * 20, "0" * 5000, "²", "1e3"):
        answer = gateway.http.get("/ui/plain", params={"offset": wrong})
        assert (answer.status_code, "whole number" in answer.text) == (400, True), wrong


def test_the_plain_list_is_refused_where_the_admin_api_is(gateway: Gateway) -> None:
    for headers in ({"host": "evil.example"}, {"sec-fetch-site": "cross-site"}, {"origin": "http://evil.example"}):
        answer = gateway.http.get("/ui/plain", headers=headers)
        assert answer.status_code == 403
        assert "<table" not in answer.text
    assert gateway.http.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200  # a link in a chat


@pytest.mark.parametrize("text", ["\u202e", "\u2066", "\x00", "\x1b", "\ufeff", "\U000e0041", "\ud800", "\u2028"])
def test_characters_that_are_not_seen_are_shown_as_numbers(text: str) -> None:
    assert plain.visible(f"a{text}b") == f"a[U+{ord(text):04X}]b"
    assert plain.visible("a\r\nb\tc é 日本 🙏") == "a\nb\tc é 日本 🙏"
