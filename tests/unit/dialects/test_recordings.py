"""Streams recorded from the real engine, read at every cut and byte by byte: the same, wherever the network cut them.

`tests/recordings/` says how they were made.
"""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.dialects.base import Dialect, Reply
from gateway.dialects.chat import ChatDialect
from gateway.dialects.completions import CompletionsDialect
from gateway.dialects.messages import MessagesDialect
from gateway.dialects.responses import ResponsesDialect
from gateway.dialects.sse import UsageFilter, events
from tests.recordings.remake import FOLDER, REQUESTS

# The first word of a recording's name, and the dialect that reads it.
DIALECTS: list[tuple[str, Dialect]] = [
    ("chat", ChatDialect()),
    ("completions", CompletionsDialect()),
    ("responses", ResponsesDialect()),
    ("messages", MessagesDialect()),
]

_VOLATILE = re.compile(rb'"(id|created)":("[^"]*"|\d+)')
NAMES = sorted(REQUESTS)
WITH_USAGE = [name for name in NAMES if name.endswith("-usage")]
READ = [(name, dialect) for name in NAMES for api, dialect in DIALECTS if name.partition("-")[0] == api]
read = pytest.mark.parametrize(("name", "dialect"), READ, ids=[name for name, _ in READ])

# The random model calls a tool with arguments that are not JSON, which cannot be sent back as an object.
_NO_REPLY = {"messages-tools": "the arguments of a tool call are not a JSON object"}


def recording(name: str) -> bytes:
    """The bytes of a stream."""
    return (FOLDER / f"{name}.sse").read_bytes()


def in_two(stream: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The stream cut once, at every place."""
    return ((stream[:cut], stream[cut:]) for cut in range(len(stream) + 1))


def bytewise(stream: bytes) -> list[bytes]:
    """The stream one byte at a time."""
    return [stream[i : i + 1] for i in range(len(stream))]


def filtered(pieces: Any, stamp: bytes | None) -> bytes:
    """What a client sees of a stream whose usage it did not ask for."""
    one = UsageFilter(stamp)
    return b"".join(map(one.feed, pieces)) + one.flush()


def without_ids(value: Any) -> Any:
    """A message without what differs between two answers."""
    return json.loads(_VOLATILE.sub(b'"id":""', json.dumps(value, separators=(",", ":")).encode()))


def test_every_recording_is_there_and_is_small() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.sse")) == NAMES
    assert all(0 < len(recording(name)) < 16_384 for name in NAMES)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("name", NAMES)
def test_events_are_the_same_at_every_cut(name: str, line_end: bytes) -> None:
    stream = recording(name)
    wanted = [line[6:] for line in stream.split(b"\n") if line.startswith(b"data: ")]
    stream = stream.replace(b"\n", line_end)
    assert list(events([stream])) == list(events(bytewise(stream))) == wanted
    for two in in_two(stream):
        assert list(events(two)) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_events_of_a_stream_that_ends_early_are_its_first_ones(name: str) -> None:
    stream = recording(name)
    whole = list(events([stream]))
    counts = []
    for before, _ in in_two(stream):
        found = list(events([before]))
        assert found == whole[: len(found)]
        counts.append(len(found))
    assert (counts[0], counts[-1]) == (0, len(whole))
    assert all(b - a in (0, 1) for a, b in itertools.pairwise(counts))


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("name", WITH_USAGE)
def test_usage_that_was_not_requested_is_filtered_at_every_cut(name: str, line_end: bytes) -> None:
    stream = recording(name)
    wanted = filtered([stream], None)
    alone = recording(name.removesuffix("-usage"))
    assert b'"choices":[]' in stream
    # Two choices come in the order in which the engine makes them.
    assert sorted(_VOLATILE.sub(b"", wanted).split(b"\n\n")) == sorted(_VOLATILE.sub(b"", alone).split(b"\n\n"))
    stream, wanted = stream.replace(b"\n", line_end), wanted.replace(b"\n", line_end)
    stamps = [None, *re.findall(rb',"system_fingerprint":"[^"]*"', stream)[-1:]]
    assert len(stamps) == 2, "vLLM stamps its usage"
    for stamp in stamps:
        assert filtered(bytewise(stream), stamp) == wanted
        for two in in_two(stream):
            assert filtered(two, stamp) == wanted


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_USAGE])
def test_a_stream_without_usage_passes_the_filter_unchanged_at_every_cut(name: str) -> None:
    stream = recording(name)
    for stamp in (b"", None):
        assert filtered(bytewise(stream), stamp) == stream
        for two in in_two(stream):
            assert filtered(two, stamp) == stream


@read
def test_a_reply_is_the_same_at_every_cut(name: str, dialect: Dialect) -> None:
    stream = recording(name)
    whole = dialect.reply([stream], streamed=True)
    assert whole.error == _NO_REPLY.get(name, "")
    assert (whole.message is None) is (name in _NO_REPLY)
    assert (whole.usage is not None) is (b'"usage":{' in stream)
    for line_end in (b"\n", b"\r\n"):
        spelt = stream.replace(b"\n", line_end)
        assert dialect.reply(bytewise(spelt), streamed=True) == whole
        for two in in_two(spelt):
            assert dialect.reply(two, streamed=True) == whole


@read
def test_a_truncated_reply_is_never_complete(name: str, dialect: Dialect) -> None:
    stream = recording(name)
    whole = dialect.reply([stream], streamed=True)
    for cut in range(len(stream)):
        reply = dialect.reply([stream[:cut]], streamed=True)
        if reply.message is None:
            assert reply.error
        else:  # only the last line end is missing
            assert (reply, stream[cut:].strip()) == (whole, b"")


@pytest.mark.parametrize("name", WITH_USAGE)
def test_a_reply_is_the_same_with_usage_and_without(name: str) -> None:
    dialect = dict(DIALECTS)[name.partition("-")[0]]

    def reply(recorded: str) -> Reply:
        return dialect.reply([recording(recorded)], streamed=True)

    with_usage, without = reply(name), reply(name.removesuffix("-usage"))
    assert without_ids(with_usage.message) == without_ids(without.message)
    assert (with_usage.usage is not None, without.usage) == (True, None)
