"""Make the pictures of the page in docs/images, from a gateway in front of fakes that has been filled and is in use.

    .venv/bin/python -m loadtests.page_pictures

Needs Chromium and Playwright, as the tests of the page do. The numbers in the pictures are those of the fake engine.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.support.browser import chromium, expect, missing
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine
from tests.support.gateway_process import ROOT
from tests.support.page_rig import PageRig, page_rig, seed

_FOLDER = ROOT / "docs" / "images"
_OBJECT_BYTES = 96 * 1024  # so that sizes look like those of a model
_SECONDS_PER_TOKEN = 0.0004  # of the fake engine's prefill
_PAUSE_S = 0.7  # between turns of one client
_CLIENTS = 3
_TURNS = 5  # of a conversation
_TOPICS = (
    "Go through part {part} of the migration plan and list what differs from the schedule. ",
    "Which tests of package {part} fail on the release branch, and since when? ",
    "Summarise ticket {part} for the customer, without names. ",
    "Review commit {part} of the new retry logic, please. ",
)


@dataclass(frozen=True, slots=True)
class Picture:
    """A file, the part of the page that it shows, and a text that is seen there once it has loaded."""

    name: str
    part: str
    text: str
    scheme: str = "light"
    width: int = 1200
    height: int = 720


PICTURES = (
    Picture("page-window.png", "#/windows/billing-decision", "Conversation"),
    Picture("page-session.png", "#/sessions/logs-0211", "message changed", scheme="dark", height=620),
    Picture("page-narrow.png", "#/windows", "in 13 d", width=400, height=760),
)
OVERVIEW = Picture("page-overview.png", "#/", "Cache hit rate", height=560)


def main() -> None:
    """Make them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long the gateway is in use before the overview")
    seconds = parser.parse_args().seconds
    if reason := missing():
        raise SystemExit(reason)
    _FOLDER.mkdir(exist_ok=True)
    engine = FakeEngine().start()
    with tempfile.TemporaryDirectory() as folder, page_rig(engine, Path(folder), object_bytes=_OBJECT_BYTES) as rig:
        seed(rig)
        with chromium() as browser:
            for picture in PICTURES:
                _take(browser, rig, picture)
            with _in_use(rig):
                _take(browser, rig, OVERVIEW, seconds)
    engine.stop()


def _take(browser: Any, rig: PageRig, picture: Picture, wait_s: float = 1) -> None:
    size = {"width": picture.width, "height": picture.height}
    context = browser.new_context(base_url=rig.gateway.url, viewport=size, color_scheme=picture.scheme)
    page = context.new_page()
    page.goto(f"/{picture.part}")
    expect(page.locator("main").get_by_text(picture.text).first).to_be_visible()
    page.wait_for_timeout(wait_s * 1000)
    page.screenshot(path=_FOLDER / picture.name)
    context.close()
    print(f"{picture.name}: {(_FOLDER / picture.name).stat().st_size / 1024:.0f} KiB")


@contextmanager
def _in_use(rig: PageRig) -> Iterator[None]:
    """Have some clients talk, with an engine that takes time for prefill."""
    done = threading.Event()

    def answer(exchange: Exchange) -> None:
        messages = exchange.request.json["messages"]
        new = messages if len(messages) < 3 else messages[-2:]
        time.sleep(_SECONDS_PER_TOKEN * sum(len(message["content"]) for message in new))
        rig.engine.answer_chat(exchange)

    rig.engine.on_chat = answer
    clients = [threading.Thread(target=_talk, args=(rig.gateway.url, number, done)) for number in range(_CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        done.set()
        for client in clients:
            client.join()


def _talk(url: str, number: int, done: threading.Event) -> None:
    """Hold one conversation after the other."""
    with httpx.Client(base_url=url, timeout=60) as http:
        for conversation in range(10_000):
            topic = _TOPICS[(conversation + number) % len(_TOPICS)]
            messages: list[dict[str, str]] = []
            for turn in range(_TURNS + number):
                messages.append({"role": "user", "content": topic.format(part=turn + 1) * (2 + number)})
                body = {"model": MODEL, "messages": messages, "stream": True}
                http.post(f"/s/client-{number}-{conversation}/v1/chat/completions", json=body).raise_for_status()
                messages.append({"role": "assistant", "content": "Hello there!"})
                if done.wait(_PAUSE_S * (1 + number * turn % 3)):
                    return


if __name__ == "__main__":
    main()
