"""The header `traceparent`, as W3C Trace Context has it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.telemetry.trace_context import TraceParent, find, header, parse, without

TRACE, SPAN = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"
GOOD = b"00-" + TRACE + b"-" + SPAN + b"-01"


@pytest.mark.parametrize(
    ("flags", "sampled"), [(b"00", False), (b"01", True), (b"02", False), (b"03", True), (b"ff", True)]
)
def test_the_last_bit_of_the_flags_says_sampled(flags: bytes, sampled: bool) -> None:
    assert parse(GOOD[:-2] + flags) == TraceParent(int(TRACE, 16), int(SPAN, 16), sampled)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"00",
        GOOD[:-1],
        GOOD + b"0",
        GOOD + b"-",
        GOOD + b"-more",  # only a later version may have more
        GOOD.upper(),
        b"ff" + GOOD[2:],
        b"00-" + b"0" * 32 + b"-" + SPAN + b"-01",
        b"00-" + TRACE + b"-" + b"0" * 16 + b"-01",
        GOOD.replace(b"-", b"_"),
        GOOD.replace(b"4", b"g", 1),
        GOOD.replace(b"4", b"\xb2", 1),
        b" " + GOOD,
        GOOD + b"\n",
        GOOD + b"," + GOOD,
    ],
)
def test_a_malformed_header_is_none(value: bytes) -> None:
    assert parse(value) is None


@pytest.mark.parametrize("value", [b"cc" + GOOD[2:], b"01" + GOOD[2:] + b"-what-comes-later"])
def test_a_later_version_is_read_as_far_as_it_is_known(value: bytes) -> None:
    assert parse(value) == parse(GOOD)


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_what_is_written_is_read(trace: int, span: int, sampled: bool) -> None:
    assert parse(header(trace, span, sampled=sampled)) == TraceParent(trace, span, sampled)


@given(st.binary(max_size=80))
def test_anything_can_be_read(value: bytes) -> None:
    parse(value)


def test_of_several_headers_none_counts() -> None:
    host, state, good = (b"host", b"x"), (b"tracestate", b"a=b"), (b"traceparent", GOOD)
    assert find([host]) == (None, False)
    assert find([host, state]) == (None, True)
    assert find([host, good, state]) == (parse(GOOD), True)
    assert find([good, host, good]) == (None, True)
    assert without([host, state, good]) == [host]
