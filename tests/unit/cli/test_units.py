"""Sizes, times and counts as people read them."""

import pytest

from gateway.cli import units

NOW = 1_800_000_000.0
MOMENT = "2027-01-15T08:00:00.000+00:00"  # the same


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1,023 bytes"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1024.0 KiB"),
        (3 * 2**20, "3.0 MiB"),
        (5 * 2**29, "2.5 GiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_size(count: int, shown: str) -> None:
    assert units.size(count) == shown


@pytest.mark.parametrize(
    ("passed", "shown"),
    [
        (-5, "just now"),  # the gateway's clock is ahead of ours
        (0.9, "just now"),
        (1, "1 s ago"),
        (119, "1 min ago"),
        (2 * 3600, "2 h ago"),
        (86400, "1 day ago"),
        (3 * 86400, "3 days ago"),
        (61 * 86400, "2027-01-15"),
    ],
)
def test_ago(passed: float, shown: str) -> None:
    assert units.ago(MOMENT, NOW + passed) == shown


def test_until_is_in_the_future_or_in_the_past() -> None:
    assert units.until(MOMENT, NOW - 3 * 3600) == "in 3 h"
    assert units.until(MOMENT, NOW + 60) == "1 min ago"
    assert units.at(MOMENT, NOW - 60) == "2027-01-15 08:00:00 UTC, in 1 min"


def test_nothing_is_said_of_no_time() -> None:
    assert (units.ago(None, NOW), units.until(None, NOW), units.at(None, NOW)) == ("", "", "")


@pytest.mark.parametrize(
    ("whole", "shown"), [(32768, "208 of 32,768 tokens (0.6%)"), (None, "208 tokens"), (0, "208 tokens")]
)
def test_share(whole: int | None, shown: str) -> None:
    assert units.share(208, whole, "token") == shown


def test_took_and_counted() -> None:
    assert (units.took(78.2), units.took(1234), units.took(2_500_000)) == ("78 ms", "1.2 s", "2,500.0 s")
    assert (units.counted(1, "chunk"), units.counted(1024, "chunk")) == ("1 chunk", "1,024 chunks")
