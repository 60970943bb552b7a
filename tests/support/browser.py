"""Debian's Chromium, driven by Playwright, and a watcher of what a page does there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

_NAMES = ("chromium", "chromium-browser", "google-chrome")
# Without the first it does not start as root; the others keep it from looking for its maker's hosts.
_ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
_REPORT = "addEventListener('securitypolicyviolation', e => console.error('CSP', e.violatedDirective, e.blockedURI))"
WITHIN_MS = 30_000


def missing() -> str:
    """What the tests in a browser need and is not here; empty if all is."""
    if not any(map(shutil.which, _NAMES)):
        return "needs Chromium: apt-get install chromium"
    if not all(find_spec(name) for name in ("playwright", "axe_playwright_python")):
        return "needs Playwright and axe: install the extra `test`"
    return ""


@contextmanager
def chromium() -> Iterator["Browser"]:
    """A browser; its Playwright keeps an event loop, so it has to end before tests that run one of their own."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415

    path = next(filter(None, map(shutil.which, _NAMES)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def expect(locator: Any) -> Any:
    """Playwright's assertions, which wait; it is imported only where it is needed, since it may not be installed."""
    from playwright import sync_api  # noqa: PLC0415

    sync_api.expect.set_options(WITHIN_MS)
    return sync_api.expect(locator)


class Watcher:
    """What a page must not do: ask another host, log an error, fail, or violate its Content-Security-Policy.

    `expected`: what the test provokes, as a status or part of a message; Chromium logs each failed request.
    """

    def __init__(self, context: "BrowserContext", url: str, *expected: int | str) -> None:
        self._host = urlsplit(url).netloc
        self._expected = tuple(f"a status of {one}" if isinstance(one, int) else one for one in expected)
        self.requests: list[str] = []
        self.problems: list[str] = []
        context.add_init_script(_REPORT)
        context.on("request", self._asked)
        context.on("console", self._logged)
        context.on("weberror", lambda error: self.problems.append(f"error: {error.error}"))
        context.on("dialog", lambda dialog: (self.problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def _asked(self, request: Any) -> None:
        self.requests.append(request.url)
        if urlsplit(request.url).netloc != self._host:
            self.problems.append(f"asked {request.url}")

    def _logged(self, message: Any) -> None:
        if message.type in ("error", "warning") and not any(known in message.text for known in self._expected):
            self.problems.append(f"{message.type}: {message.text} ({message.location})")

    def check(self) -> None:
        """Fail if it did any of that."""
        assert not self.problems, self.problems
        assert self.requests != []


@contextmanager
def watched_page(browser: "Browser", url: str, *expected: int | str, **options: Any) -> Iterator["Page"]:
    """A page in a context of its own, which must not do what a `Watcher` watches for."""
    context = browser.new_context(base_url=url, **options)
    context.set_default_timeout(WITHIN_MS)
    watcher = Watcher(context, url, *expected)
    try:
        yield context.new_page()
        watcher.check()
    finally:
        context.close()


def inaccessible(page: "Page") -> list[str]:
    """What axe finds wrong with a page: contrast, labels, roles, names."""
    from axe_playwright_python.sync_playwright import Axe  # noqa: PLC0415

    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {node['html']} {node['failureSummary']}" for one in found for node in one["nodes"]]
