"""What a refusal has to look like."""

from typing import Any

from tests.support.admin_requests import error_of


def assert_refused(response: Any, code: str, *says: str) -> None:
    """It was refused in the admin API's shape, and the words are there."""
    status, got = error_of(response)
    assert (status, got) == (400, code), response.text
    for words in says:
        assert words in response.text
