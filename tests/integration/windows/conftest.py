"""A window of the shared gateway."""

import pytest

from tests.support.admin_requests import freeze
from tests.support.gateway_process import Gateway


@pytest.fixture
def window(gateway: Gateway, session: str) -> str:
    """A window of two messages, without KV."""
    freeze(gateway, session, f"w-{session}", description="first", tags=["a", "b"], ttl_seconds=60)
    return f"w-{session}"
