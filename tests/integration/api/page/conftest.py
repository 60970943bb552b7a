"""A browser, and a gateway with something to look at."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import browser
from tests.support.fakes.engine import FakeEngine
from tests.support.page_rig import PageRig, page_rig, seed


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser of this file's own: none may live while another file's tests run an event loop."""
    if reason := browser.missing():
        pytest.skip(reason)
    with browser.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageRig]:
    """A gateway with conversations, windows and a lineage."""
    engine = FakeEngine().start()
    try:
        with page_rig(engine, tmp_path_factory.mktemp("page")) as found:
            seed(found)
            yield found
    finally:
        engine.stop()
