"""An engine that has the Responses API."""

import pytest

from tests.support.fakes.engine import FakeEngine
from tests.support.fakes.responses import serve


@pytest.fixture
def engine(engine: FakeEngine) -> FakeEngine:
    """One that speaks the Responses API."""
    serve(engine)
    return engine
