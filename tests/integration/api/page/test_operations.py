"""What a person does with windows and sessions on the page, and what the gateway has done then."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.browser import expect, inaccessible, watched_page
from tests.support.fakes.engine import FakeEngine
from tests.support.page_rig import PageRig, page_rig

if TYPE_CHECKING:
    from playwright.sync_api import Page

PLAN = [("Where do we go?", "North, by the coast."), ("And then?", "Inland, to the lake.")]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageRig]:
    """A session and a window of it."""
    engine = FakeEngine().start()
    try:
        with page_rig(engine, tmp_path_factory.mktemp("page")) as found:
            found.talk("route", PLAN)
            found.freeze("route", "the-route", description="Where we go")
            yield found
    finally:
        engine.stop()


@contextmanager
def _opened(chromium: Any, rig: PageRig, where: str, button: str) -> Iterator["Page"]:
    """A page with the dialog of an operation."""
    with watched_page(chromium, rig.gateway.url, 409) as page:
        page.goto(f"/#/{where}")
        page.get_by_role("button", name=button, exact=True).click()
        assert inaccessible(page) == []
        yield page


def _run(page: "Page", button: str, *texts: str) -> None:
    """Run the operation, and wait for its result."""
    page.get_by_role("dialog").get_by_role("button", name=button, exact=True).click()
    for text in texts:
        expect(page.get_by_role("dialog").get_by_text(text).first).to_be_visible()


def test_a_window_is_thawed_with_a_receipt_and_a_base_url(chromium: Any, rig: PageRig) -> None:
    with _opened(chromium, rig, "windows/the-route", "Thaw…") as page:
        page.get_by_label("New session").fill("route-2")
        _run(page, "Thaw", "Session", f"{rig.gateway.url}/s/route-2/v1", "chunks found")
        found = rig.gateway.http.get("/admin/sessions/route-2").json()
        assert (found["state"], found["window"]) == ("thawed", "the-route")
        _run(page, "Thaw", "already")  # the gateway's own words for a name that is taken


def test_a_window_is_thawed_at_an_earlier_turn(chromium: Any, rig: PageRig) -> None:
    with _opened(chromium, rig, "windows/the-route", "Thaw…") as page:
        page.keyboard.press("Escape")
        expect(page.get_by_text("End of turn 2", exact=True)).to_be_visible()
        page.get_by_role("button", name="Thaw here…").first.click()
        expect(page.get_by_label("At turn")).to_have_value("1")
        page.get_by_label("New session").fill("after-one-turn")
        _run(page, "Thaw", "after-one-turn", "at turn")
    text = rig.gateway.http.get("/admin/sessions/after-one-turn/messages").json()["messages"]
    assert [message["content"] for message in text][1:] == [*PLAN[0]]


def test_a_window_is_asked(chromium: Any, rig: PageRig) -> None:
    with _opened(chromium, rig, "windows/the-route", "Ask…") as page:
        page.get_by_label("Question").fill("Which way?")
        page.get_by_label("At most").fill("20")
        _run(page, "Ask", "Hello there!")
    asked = rig.engine.seen("/v1/chat/completions")[-1].json
    assert asked["messages"][-1]["content"] == "Which way?"


def test_a_search_shows_what_it_found_and_the_best_windows_are_asked(chromium: Any, rig: PageRig) -> None:
    with watched_page(chromium, rig.gateway.url) as page:
        page.goto("/#/windows")
        page.get_by_label("Search").fill("inland lake")
        page.get_by_role("button", name="Search").click()
        expect(page.get_by_role("cell").filter(has_text="the-route")).to_contain_text(
            "assistant 5 Inland, to the lake."
        )
        page.get_by_role("button", name="Ask…").click()
        expect(page.get_by_label("Of windows with")).to_have_value("inland lake")
        page.get_by_label("Question").fill("Which way?")
        _run(page, "Ask", "Where do we go?", "Hello there!")
        assert inaccessible(page) == []


def test_a_window_is_cloned_and_its_clone_deleted_once_confirmed(chromium: Any, rig: PageRig) -> None:
    with _opened(chromium, rig, "windows/the-route", "Clone…") as page:
        page.get_by_label("Name of the clone").fill("the-copy")
        _run(page, "Clone", "Cloned into", "0 bytes copied")
        page.get_by_role("link", name="the-copy").click()
        page.get_by_role("button", name="Delete…").click()
        expect(page.get_by_role("dialog")).to_contain_text("the-copy and its text are deleted")
        page.get_by_role("button", name="Close").click()
        assert rig.gateway.http.get("/admin/windows/the-copy").status_code == 200
        page.get_by_role("button", name="Delete…").click()
        _run(page, "Delete it for good", "the-copy: freed")
        expect(page.get_by_role("heading", name="Windows", exact=True)).to_be_attached()
    assert rig.gateway.http.get("/admin/windows/the-copy").status_code == 404


def test_a_window_is_verified_loaded_and_evicted(chromium: Any, rig: PageRig) -> None:
    with _opened(chromium, rig, "windows/the-route", "Verify…") as page:
        _run(page, "Verify", "intact", "usable")
        page.keyboard.press("Escape")
        for name, text in (("Load", "found"), ("Evict", "before")):
            page.get_by_role("button", name=f"{name}…").click()
            _run(page, name, text)
            page.keyboard.press("Escape")


def test_a_session_is_frozen_and_deleted(chromium: Any, rig: PageRig) -> None:
    rig.talk("short", [("Hello?", "Yes.")])
    with _opened(chromium, rig, "sessions/short", "Freeze…") as page:
        page.get_by_label("Name of the window").fill("of-short")
        page.get_by_label("Tags").fill("one, two,")
        _run(page, "Freeze", "Frozen into")
        assert rig.gateway.http.get("/admin/windows/of-short").json()["tags"] == ["one", "two"]
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Check rules").click()
        expect(page.get_by_role("dialog")).to_contain_text("Would not be frozen now")
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Delete…").click()
        _run(page, "Delete it", "Freed")
    assert rig.gateway.http.get("/admin/sessions/short").status_code == 404


def test_the_rules_are_changed_and_go_back_to_the_settings(chromium: Any, rig: PageRig) -> None:
    with _opened(chromium, rig, "rules", "Change…") as page:
        page.get_by_label("Idle minutes").fill("")
        page.get_by_label("Tokens").fill("2000")
        _run(page, "Change", "Changed, and kept across restarts.")
        rules = rig.gateway.http.get("/admin/policies").json()
        assert (rules["idle_timeout_minutes"], rules["token_threshold"], rules["keep"]) == (None, 2000, 3)
        assert set(rules["set_at_run_time"]) == {"idle_timeout_minutes", "token_threshold"}
        page.keyboard.press("Escape")
        expect(page.get_by_text("set here").first).to_be_visible()
        page.get_by_role("button", name="Back to the settings…").click()
        _run(page, "Remove what was set here", "The settings apply again.")
    assert rig.gateway.http.get("/admin/policies").json()["set_at_run_time"] == []


def test_the_self_test_runs(chromium: Any, rig: PageRig) -> None:
    with watched_page(chromium, rig.gateway.url) as page:
        page.goto("/#/engines")
        page.get_by_role("button", name="Run the self-test").click()
        expect(page.get_by_text("every page is intact")).to_be_visible()
