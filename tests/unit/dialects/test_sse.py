"""Server-sent events: read at every cut, and filtered without touching a byte too many."""

import json
import re
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.sse import UsageFilter, events
from tests.support.fakes.engine import DONE, chunk_event, delta, stream_of, usage_of

USAGE = chunk_event([], usage_of(12, 3, cached=8))
# A reply that talks about the mark: inside a JSON string its quotes are escaped.
TALK = delta(content='{"choices":[]} and "choices":[] in 日本語 🎉')
RECORDING = b"".join([b": ping\n\n", delta(role="assistant", content=""), TALK, *stream_of(["é"])[1:-1], USAGE, DONE])
WITHOUT_USAGE = RECORDING.replace(USAGE, b"")
ENDS = [match.end() for match in re.finditer(b"\n\n", RECORDING)]


def spelt(stream: bytes, line_end: bytes) -> bytes:
    return stream.replace(b"\n", line_end)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_events_are_the_same_wherever_a_recording_was_cut(line_end: bytes) -> None:
    stream = spelt(RECORDING, line_end)
    whole = list(events([stream]))
    assert [json.loads(data)["choices"] for data in whole[:2]] == [
        [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}],
        json.loads(TALK[6:])["choices"],
    ]
    assert whole[-1] == b"[DONE]"
    assert list(events(stream[i : i + 1] for i in range(len(stream)))) == whole
    for cut in range(len(stream)):
        assert list(events([stream[:cut], stream[cut:]])) == whole


def test_an_event_of_several_data_lines_is_one_and_other_fields_are_skipped() -> None:
    stream = b": comment\nid: 7\nevent: x\ndata: a\ndata:b\ndata:  c\nretry: 1\n\ndata:\n\n"
    assert list(events([stream])) == [b"a\nb\n c", b""]


NAMED = b'event: a\ndata: {"x": 1}\n\nevent: b\ndata: event: c\n\n'


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_events_with_names_are_the_same_wherever_a_recording_was_cut(line_end: bytes) -> None:
    stream = spelt(NAMED, line_end)
    for cut in range(len(stream)):
        assert list(events([stream[:cut], stream[cut:]])) == [b'{"x": 1}', b"event: c"]


@pytest.mark.parametrize(
    ("stream", "data"),
    [
        (b"event: a\ndata: one\ndata: two\n\nevent: b\nid: 7\n\n", [b"one\ntwo"]),
        (b"event: a\ndata: \n\n", [b""]),
        (b"event: a\nevent: b\n\nevent: c\ndata: one\n\n", [b"one"]),
        (b"event: a\ndata: one\n\ndata: two\n\n", [b"one", b"two"]),
        (b"event: a\n\n", []),
    ],
)
def test_streams_that_are_named_oddly_are_read_all_the_same(stream: bytes, data: list[bytes]) -> None:
    assert list(events([stream])) == data


def test_an_unterminated_event_is_ignored() -> None:
    assert list(events([b"data: one\n\ndata: two\n"])) == [b"one"]
    assert list(events([b"data: one\n\ndata: two"])) == [b"one"]
    assert list(events([])) == []


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_the_filter_takes_out_exactly_the_usage_event_at_every_cut(line_end: bytes) -> None:
    stream, wanted = spelt(RECORDING, line_end), spelt(WITHOUT_USAGE, line_end)
    for cut in range(len(stream) + 1):
        one = UsageFilter()
        assert one.feed(stream[:cut]) + one.feed(stream[cut:]) + one.flush() == wanted, cut


def test_the_filter_takes_it_out_byte_by_byte() -> None:
    for stream, wanted in ((RECORDING, WITHOUT_USAGE), (spelt(RECORDING, b"\r\n"), spelt(WITHOUT_USAGE, b"\r\n"))):
        one = UsageFilter()
        assert b"".join(one.feed(stream[i : i + 1]) for i in range(len(stream))) + one.flush() == wanted


def test_the_filter_hands_on_whole_events_as_the_objects_they_are() -> None:
    chunks = [delta(content="a"), TALK, TALK + DONE, b": ping\n\n"]
    assert UsageFilter().pass_on(chunks) is chunks


@given(st.data())
def test_the_filter_passes_batches_on_as_it_does_each_chunk(data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(RECORDING)) | st.sampled_from(ENDS), max_size=12).map(sorted))
    chunks = [RECORDING[a:b] for a, b in pairwise([0, *cuts, len(RECORDING)]) if a < b]
    borders = data.draw(st.lists(st.integers(0, len(chunks)), max_size=4).map(sorted))
    stamp = data.draw(st.sampled_from([None, b"", b',"system_fingerprint":"v"']))
    one, other = UsageFilter(stamp), UsageFilter(stamp)
    batches = [one.pass_on(chunks[a:b]) for a, b in pairwise([0, *borders, len(chunks)]) if a < b]
    assert [chunk for batch in batches for chunk in batch] == [*filter(None, map(other.feed, chunks))]
    assert one.flush() == other.flush()


def test_the_filter_gives_back_what_it_held_when_the_stream_ends() -> None:
    one = UsageFilter()
    assert one.feed(DONE + b"data: half") == DONE
    assert one.flush() == b"data: half"
    assert one.flush() == b""


def test_a_large_event_costs_time_in_proportion_to_its_size() -> None:
    event = delta(content="x" * 8 * 2**20)
    one = UsageFilter()
    clock = time.process_time()
    out = [one.feed(event[start : start + 65_536]) for start in range(0, len(event), 65_536)]
    assert b"".join(out) == event
    assert time.process_time() - clock < 6  # linear: 50 ms to a second; rescanning what is held: 20 s and more


def test_an_unterminated_large_event_is_relayed_and_filtering_resumes() -> None:
    one, endless = UsageFilter(), b"x" * 65_536
    pieces = 2 * UsageFilter.MOST_HELD // len(endless)
    shown = [one.feed(endless) for _ in range(pieces)]
    assert len(b"".join(shown)) == pieces * len(endless)
    assert [bool(piece) for piece in shown].index(True) * len(endless) == UsageFilter.MOST_HELD
    assert one.feed(b"x\n") + one.feed(b"\n" + TALK + USAGE[:9]) + one.feed(USAGE[9:] + DONE) == b"x\n\n" + TALK + DONE


def test_what_waits_for_a_usage_event_that_does_not_come_is_bounded() -> None:
    one, last = UsageFilter(None), delta(content="x" * 65_536, finish_reason="stop")
    shown = b"".join(one.feed(last) for _ in range(2 * UsageFilter.MOST_HELD // len(last)))
    assert len(shown) >= UsageFilter.MOST_HELD - 2 * len(last)
    assert one.stamp is None


class Narrow(UsageFilter):
    MOST_HELD = 10


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_events_too_large_to_buffer_keep_every_byte_at_any_cut(line_end: bytes) -> None:
    stream = spelt(RECORDING, line_end)
    for cut in range(len(stream) + 1):
        one = Narrow()
        shown = one.feed(stream[:cut]) + one.feed(stream[cut:]) + one.flush()
        assert shown in (stream, spelt(WITHOUT_USAGE, line_end)), cut
    one = Narrow()
    assert b"".join(one.feed(stream[i : i + 1]) for i in range(len(stream))) + one.flush() == stream
