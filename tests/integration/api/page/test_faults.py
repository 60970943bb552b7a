"""The page where something is wrong: markup in every field, a window that is gone, a restart, a proxy, no scripts."""

import asyncio
import http.client
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gateway.store.sqlite import SqliteStore
from tests.support import store_records
from tests.support.browser import expect, watched_page
from tests.support.fakes.engine import Exchange, FakeEngine
from tests.support.page_rig import PageRig, page_rig

MANY = 10_000
AT_ONCE = 500
ATTACK = (
    "<img src=x onerror=\"pwned='img'\"><script>pwned='script'</script><a href=\"javascript:pwned='link'\">x</a>"
    "<svg onload=\"pwned='svg'\">{{7*7}}${7*7}\u202egnirts\u202c\x1b[31m\u2066\x07</title></td></main>"
)
SHOWN = "[U+202E]gnirts[U+202C][U+001B][31m[U+2066][U+0007]"


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """An engine of a test's own."""
    found = FakeEngine().start()
    yield found
    found.stop()


@pytest.fixture
def empty(engine: FakeEngine, tmp_path: Path) -> Iterator[PageRig]:
    """A gateway of a test's own."""
    with page_rig(engine, tmp_path) as found:
        yield found


def _attack(rig: PageRig) -> None:
    """Put it into every field that takes it; names and tags take no markup."""
    model = f"m{ATTACK}"
    card = {"id": model, "object": "model", "root": ATTACK, "parent": None, "max_model_len": 32768}

    def models(exchange: Exchange) -> None:
        exchange.json({"object": "list", "data": [card]})

    rig.engine.on_models = models
    rig.gateway.stop()
    rig.gateway.start().wait()
    call = {"id": ATTACK, "type": "function", "function": {"name": ATTACK, "arguments": ATTACK}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": ATTACK},
        {"role": "user", "name": ATTACK, "content": [{"type": "text", "text": ATTACK}]},
    ]
    rig.say("attacked", messages, {"content": ATTACK, "reasoning": ATTACK, "tool_calls": [call]}, model)
    messages.append({"role": "tool", "tool_call_id": ATTACK, "content": ATTACK})
    rig.say("attacked", messages, {"content": ATTACK}, model)
    rig.freeze("attacked", "attacked-window", description=ATTACK, tags=["日本", "א"])


def test_markup_and_control_characters_are_shown_and_never_interpreted(chromium: Any, empty: PageRig) -> None:
    _attack(empty)
    seen: dict[str, str] = {}
    with watched_page(chromium, empty.gateway.url, 400) as page:
        page.goto("/")
        for part, text in (
            ("#/", "attacked-window"), ("#/windows", "attacked-window"), ("#/windows/attacked-window", SHOWN),
            ("#/windows/attacked-window?tab=receipt", "tail tokens"), ("#/sessions", "attacked"),
            ("#/sessions/attacked", "first turn"), ("#/tree", "attacked-window"), ("#/cache", "LMCache"),
            ("#/engines", SHOWN),
            (f"#/windows?search={ATTACK[:20]}&tags=%3Cb%3E", "must be tags of"),
            ("#/windows/%3Cimg%20src=x%3E", "not a valid window name"),
        ):  # fmt: skip
            page.evaluate("where => { location.hash = where; }", part)
            expect(page.locator("main").get_by_text(text).first).to_be_visible()
            if part == "#/windows/attacked-window":  # its messages come after it
                page.wait_for_function("() => document.querySelector('main').innerText.split('<img src=x').length > 6")
            seen[part] = page.locator("main").inner_text()
            assert page.evaluate("typeof pwned") == "undefined", part
            assert page.locator("main :is(img, script, iframe, object), main a[href^=javascript]").count() == 0, part
        page.goto("/#/windows/attacked-window")
        page.get_by_role("button", name="Delete…").click()
        expect(page.get_by_role("dialog")).to_contain_text("cannot be undone")
    assert not any({"\u202e", "\x1b", "\u2066", "\x07"} & set(text) for text in seen.values())


def test_a_window_that_is_deleted_meanwhile_is_said_to_be_gone(chromium: Any, empty: PageRig) -> None:
    empty.talk("s", [("What was the plan?", "To go north.")])
    empty.freeze("s", "short-lived")
    with watched_page(chromium, empty.gateway.url, 404) as page:
        page.clock.install()
        page.goto("/#/windows/short-lived")
        expect(page.get_by_text("To go north.")).to_be_visible()
        assert empty.gateway.http.delete("/admin/windows/short-lived").status_code == 200
        page.clock.run_for(11_000)
        expect(page.get_by_role("alert")).to_contain_text("There is no window short-lived")
        expect(page.get_by_role("button", name="Thaw…")).to_be_disabled()
        expect(page.get_by_text("To go north.")).to_be_visible()


def test_a_place_that_is_none_and_a_page_beyond_the_list_say_so(chromium: Any, empty: PageRig) -> None:
    empty.talk("s", [("hello", "there")])
    with watched_page(chromium, empty.gateway.url) as page:
        for place in ("constructor", "__proto__", "toString/x", "nowhere"):
            page.goto(f"/#/{place}")
            expect(page.get_by_role("heading", name="Nothing here")).to_be_visible()
            page.goto("/#/rules")
            expect(page.get_by_role("heading", name="Automatic windows")).to_be_visible()
        page.goto("/#/sessions?offset=50")
        expect(page.get_by_text("the list ends before it")).to_be_visible()
        expect(page.get_by_text("1 session", exact=True)).to_be_visible()


def test_a_restart_under_an_open_page_is_said_and_survived(chromium: Any, empty: PageRig) -> None:
    empty.talk("s", [("Before?", "Yes.")])
    with watched_page(chromium, empty.gateway.url, "ERR_CONNECTION") as page:
        page.goto("/#/sessions")
        expect(page.get_by_text("1 to 1 of 1 session")).to_be_visible()
        empty.gateway.stop()
        expect(page.get_by_role("status").first).to_contain_text("does not answer")
        expect(page.get_by_text("1 to 1 of 1 session")).to_be_visible()
        empty.gateway.start().wait()
        expect(page.get_by_role("status").first).to_contain_text("answers again")
        empty.talk("t", [("After?", "Yes.")])
        expect(page.get_by_text("1 to 2 of 2 sessions")).to_be_visible()


def test_without_scripts_the_plain_list_is_shown(chromium: Any, empty: PageRig) -> None:
    empty.talk("s", [("Hello?", "Yes.")])
    empty.freeze("s", "a-window", description="said plainly")
    with watched_page(chromium, empty.gateway.url, java_script_enabled=False) as page:
        page.goto("/")
        expect(page.get_by_role("cell", name="said plainly")).to_be_visible()
        assert page.url.endswith("/ui/plain")


@pytest.mark.sqlite
def test_ten_thousand_windows_are_paged(chromium: Any, empty: PageRig) -> None:
    empty.gateway.stop()
    with ThreadPoolExecutor(1) as other:  # the browser's event loop is in this thread
        other.submit(asyncio.run, _fill(empty.gateway.data_dir / "gateway.db")).result()
    empty.gateway.start().wait()
    with watched_page(chromium, empty.gateway.url) as page:
        page.goto("/#/windows")
        expect(page.get_by_text("1 to 25 of 10,000 windows")).to_be_visible()
        page.get_by_role("link", name="Last").click()
        expect(page.get_by_text("9,976 to 10,000 of 10,000 windows")).to_be_visible()
        assert page.locator("main tbody tr").count() == 25
        page.goto("/#/tree")
        expect(page.get_by_text("The newest 2,000 of 10,000 windows")).to_be_visible()
        assert page.locator("main li").count() < 500


async def _fill(path: Path) -> None:
    async with SqliteStore(path, turns_kept=20) as store:
        for start in range(0, MANY, AT_ONCE):
            numbers = range(start, start + AT_ONCE)
            await asyncio.gather(*(store_records.add(store, f"w-{n:05d}", created_at=1e9 + n) for n in numbers))


class _Proxy(BaseHTTPRequestHandler):
    """A reverse proxy that serves a gateway below /tools/cwg/, and nothing else."""

    protocol_version = "HTTP/1.1"
    port: int

    def _pass_on(self) -> None:
        if not self.path.startswith("/tools/cwg/"):
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        with closing(http.client.HTTPConnection("127.0.0.1", self.port)) as upstream:
            upstream.request(self.command, self.path.removeprefix("/tools/cwg"), body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        with suppress(ConnectionError):  # the browser may have gone
            self.wfile.write(content)

    do_GET = do_POST = do_DELETE = _pass_on

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def _proxy(port: int) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Proxy", (_Proxy,), {"port": port}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_page_works_behind_a_proxy_under_a_path(chromium: Any, empty: PageRig) -> None:
    empty.talk("s", [("Hello?", "Yes.")])
    empty.freeze("s", "a-window")
    with _proxy(empty.gateway.port) as url, watched_page(chromium, url) as page:
        page.goto("/tools/cwg/")
        page.locator("[href='#/windows/a-window']").click()
        page.get_by_role("button", name="Thaw…").click()
        page.get_by_label("New session").fill("thawed-here")
        page.get_by_role("button", name="Thaw", exact=True).click()
        expect(page.get_by_role("dialog")).to_contain_text(f"{url}/tools/cwg/s/thawed-here/v1")
        page.get_by_role("link", name="thawed-here").click()
        expect(page.get_by_role("heading", name="Turns")).to_be_visible()
    with _proxy(empty.gateway.port) as url, watched_page(chromium, url, java_script_enabled=False) as page:
        page.goto("/tools/cwg/")
        expect(page.get_by_role("cell", name="a-window")).to_be_visible()
