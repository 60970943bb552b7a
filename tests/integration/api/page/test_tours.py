"""Tours of every part of the page in Chromium: light, dark, narrow, by keyboard, with and without a key."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import expect, inaccessible, watched_page
from tests.support.fakes.engine import FakeEngine
from tests.support.page_rig import PageRig, page_rig

WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 400, "height": 800}
KEY = "correct-horse-battery"
# Each part, and what is seen there once it has loaded.
PARTS = {
    "#/": ("Cache hit rate", "Windows, newest first", "billing-decision"),
    "#/windows": ("billing-for-audit", "1 to 5 of 5 windows", "#billing", "in 13 d"),
    "#/windows?tags=billing": ("tag billing", "billing-approach-a"),
    "#/windows/billing-decision": ("Write the migration for the claims table", "Conversation", "Expires"),
    "#/windows/billing-decision?tab=kv": ("KV objects", "1 to 50 of", "cpu, disk"),
    "#/windows/billing-decision?tab=receipt": ("tail tokens",),
    "#/windows/billing-decision?tab=lineage": ("Clones", "billing-for-audit"),
    "#/sessions": ("approach-a", "1 to 6 of 6 sessions"),
    "#/sessions/logs-0211": ("message changed", "expected in the cache, computed", "Context"),
    "#/tree": ("Lineage", "billing-approach-a", "thawed"),
    "#/cache": ("Bytes by tier and owner", "LMCache's memory", "message changed"),
    "#/engines": ("Components", "passed the self-test"),
    "#/rules": ("idle_timeout_minutes", "15 min"),
    "#/nowhere": ("Nothing here",),
}  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "size"), [("light", WIDE), ("dark", WIDE), ("light", NARROW)], ids=["light", "dark", "narrow"]
)
def test_every_part_is_shown_and_accessible(chromium: Any, rig: PageRig, scheme: str, size: dict[str, int]) -> None:
    with watched_page(chromium, rig.gateway.url, color_scheme=scheme, viewport=size) as page:
        page.goto("/")
        for part, texts in PARTS.items():
            page.evaluate("where => { location.hash = where; }", part)
            for text in texts:
                expect(page.locator("main").get_by_text(text).first).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{part} scrolls sideways"
            assert inaccessible(page) == [], part


def test_the_page_is_used_by_keyboard_alone(chromium: Any, rig: PageRig) -> None:
    with watched_page(chromium, rig.gateway.url) as page:
        page.goto("/#/windows")
        expect(page.get_by_text("billing-decision").first).to_be_visible()
        page.keyboard.press("/")
        expect(page.get_by_label("Search")).to_be_focused()
        page.keyboard.type("audit")
        page.keyboard.press("Enter")
        expect(page.get_by_text("1 to 1 of 1 window")).to_be_visible()
        page.get_by_role("table").get_by_role("link").first.focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Thaw…")).to_be_visible()
        page.get_by_role("button", name="Delete…").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_contain_text("cannot be undone")
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        expect(page.get_by_role("button", name="Delete…")).to_be_focused()


def test_the_first_stop_of_the_keyboard_skips_the_navigation(chromium: Any, rig: PageRig) -> None:
    with watched_page(chromium, rig.gateway.url) as page:
        page.goto("/#/windows")
        page.keyboard.press("Tab")
        expect(page.get_by_text("Skip to content")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("main")).to_be_focused()
        expect(page.get_by_role("heading", name="Windows")).to_be_visible()


def test_a_refresh_leaves_the_focus_where_it_was(chromium: Any, rig: PageRig) -> None:
    with watched_page(chromium, rig.gateway.url) as page:
        page.clock.install()
        page.goto("/#/sessions/approach-b")
        freeze = page.get_by_role("button", name="Freeze…")
        freeze.focus()
        with page.expect_response("**/admin/sessions/approach-b"):
            page.clock.run_for(7000)
        expect(freeze).to_be_focused()


def test_the_switch_of_colours_is_kept(chromium: Any, rig: PageRig) -> None:
    with watched_page(chromium, rig.gateway.url, color_scheme="light") as page:
        page.goto("/")
        paper = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(paper)
        switch = page.get_by_role("button", name="Colours")
        switch.click()
        assert page.evaluate(paper) == light
        switch.click()
        dark = page.evaluate(paper)
        assert dark != light
        page.reload()
        assert page.evaluate(paper) == dark
        expect(switch).to_have_text("Dark")


def test_a_key_is_asked_for_and_kept_in_the_tab_only(chromium: Any, tmp_path: Path) -> None:
    engine = FakeEngine().start()
    try:
        with page_rig(engine, tmp_path, api_key=KEY) as rig, watched_page(chromium, rig.gateway.url, 401) as page:
            page.goto("/#/engines")
            expect(page.get_by_role("heading", name="This gateway asks for a key")).to_be_visible()
            assert inaccessible(page) == []
            for wrong, problem in (("wrong", "That key was refused"), ("schlüssel", "beyond ASCII")):
                page.get_by_label("API key").fill(wrong)
                page.get_by_role("button", name="Continue").click()
                expect(page.get_by_role("alert")).to_contain_text(problem)
            page.get_by_label("API key").fill(KEY)
            page.get_by_role("button", name="Continue").click()
            expect(page.get_by_text("passed the self-test")).to_be_visible()
            assert page.evaluate("[sessionStorage.getItem('cwg-key'), JSON.stringify(localStorage)]") == [KEY, "{}"]
            assert page.context.cookies() == []
            assert KEY not in page.url
            page.reload()
            expect(page.get_by_text("passed the self-test")).to_be_visible()
            other = page.context.new_page()
            other.goto("/")
            expect(other.get_by_label("API key")).to_be_visible()
            page.get_by_role("button", name="Forget key").click()
            expect(page.get_by_label("API key")).to_be_visible()
    finally:
        engine.stop()


def test_a_late_refusal_does_not_take_a_new_key_away(chromium: Any, tmp_path: Path) -> None:
    engine = FakeEngine().start()
    held: list[Any] = []
    try:
        with page_rig(engine, tmp_path, api_key=KEY) as rig, watched_page(chromium, rig.gateway.url, 401) as page:
            page.route("**/admin/metrics", lambda route: route.continue_() if held else held.append(route))
            page.goto("/#/rules")
            page.get_by_label("API key").fill(KEY)
            page.get_by_role("button", name="Continue").click()
            expect(page.get_by_text("idle_timeout_minutes")).to_be_visible()
            with page.expect_response("**/admin/metrics") as late:
                held[0].continue_()
            assert late.value.status == 401
            late.value.finished()
            page.get_by_role("link", name="Sessions").click()
            expect(page.get_by_text("No session yet")).to_be_visible()
            assert page.evaluate("sessionStorage.getItem('cwg-key')") == KEY
    finally:
        engine.stop()
