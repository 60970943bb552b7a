"""Server-sent events: `events` reads a recorded stream; `UsageFilter` removes the usage event from one on its way."""

import re
from collections.abc import Iterable, Sequence

# An event ends at an empty line; a line ends at CRLF, LF or CR (WHATWG HTML, "Server-sent events", 9.2.6).
# A CR at the very end of the data so far may be half of a CRLF, so it is not an end yet.
# Written twice and not as `{2}`: only then does `re` know which bytes a match can begin with, and skip the others.
_LINE_END = rb"(?:\r\n|\n|\r(?=[^\n]))"
_END_OF_EVENT = re.compile(_LINE_END + _LINE_END)


def events(chunks: Iterable[bytes]) -> list[bytes]:
    """Return the `data` of every complete event of a recorded stream, wherever its chunks were cut."""
    whole = b"".join(chunks)
    if regular := _plain(whole) or _named(whole):
        return regular
    found: list[bytes] = []
    data: list[bytes] = []
    lines = whole.splitlines()
    if not whole.endswith((b"\n", b"\r")):
        del lines[-1:]  # not a line yet
    for line in lines:
        if not line:
            if data:
                found.append(b"\n".join(data))
                data = []
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
    return found


def _plain(whole: bytes) -> list[bytes]:
    """The data of a stream as every engine writes it, each event one line of data; empty if it is different.

    A few passes over the stream take a fraction of the time that reading it line by line does.
    """
    data = whole[6:-2].split(b"\n\ndata: ")
    return data if _is_regular(whole, b"data: ", lines=2 * len(data)) else []


def _named(whole: bytes) -> list[bytes]:
    """The data of a stream whose every event is a line of name and one of data; empty if it is different."""
    data = [event.partition(b"\ndata: ")[2] for event in whole[7:-2].split(b"\n\nevent: ")]
    return data if all(data) and _is_regular(whole, b"event: ", lines=3 * len(data)) else []


def _is_regular(whole: bytes, begin: bytes, *, lines: int) -> bool:
    """Whether a stream begins and ends with an event, and has exactly so many lines, each ending with LF."""
    return whole.startswith(begin) and whole.endswith(b"\n\n") and whole.count(b"\n") == lines and b"\r" not in whole


class UsageFilter:
    """Removes the final usage event from a stream, for a client that did not ask for it, without a trace.

    A chunk that ends with an event and holds neither mark (all but two of a stream) is passed on as it is; only an
    event that the network split is held back until its end is there. An event of more than `MOST_HELD` bytes is passed
    on unexamined.

    OpenAI's API marks the usage event with an empty `choices` list, which no event of a reply has. Inside a JSON string
    the quotes would be escaped, so a model that talks about `"choices":[]` does not trigger it. vLLM stamps its
    `system_fingerprint` on the usage event if there is one, else on the event that finishes a choice
    (`chat_completion/serving.py`); so that event gets the stamp that it would have had. The stamp is the same for every
    answer of an engine: `stamp` is the one of an earlier stream (b"" if that had none), None if there was no stream
    yet, and then the last events wait for the usage event, which follows at once.
    """

    USAGE = b'"choices":[]'
    FINISH = b'"finish_reason":"'
    MOST_HELD = 4 * 2**20  # usage events have a few hundred bytes, events with log probabilities up to a megabyte
    _STAMP = re.compile(rb'(,"system_fingerprint":"[^"]*")[^{}]*\}\s*$')

    def __init__(self, stamp: bytes | None = b"") -> None:
        self.stamp = stamp
        self._held: list[bytes] = []  # pieces of an event whose end has not come
        self._waiting: list[bytes] = []
        self._size = 0  # bytes of both
        self._tail: bytes | None = None  # the last bytes of an event that is passed on unexamined

    def pass_on(self, chunks: Sequence[bytes]) -> Sequence[bytes]:
        """Return the chunks that may go to the client now."""
        if len(chunks) == 1 and not self._size and self._tail is None:
            (chunk,) = chunks
            if self.USAGE not in chunk and self.FINISH not in chunk and chunk.endswith(b"\n\n"):
                return chunks
        free = self._free(chunks)
        return chunks if free == len(chunks) else [*chunks[:free], *filter(None, map(self.feed, chunks[free:]))]

    def _free(self, chunks: Sequence[bytes]) -> int:
        """How many of the first chunks are whole events that may go as they are."""
        if self._size or self._tail is not None:
            return 0
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        end = min((at for at in (data.find(self.USAGE), data.find(self.FINISH)) if at >= 0), default=len(data))
        for number, chunk in enumerate(chunks):
            end -= len(chunk)
            if end < 0 or not chunk.endswith(b"\n\n"):
                return number
        return len(chunks)

    def feed(self, chunk: bytes) -> bytes:
        """Return the part of a chunk that may go to the client now; empty if it is held back."""
        if self._tail is not None:
            return self._feed_oversized(self._tail, chunk)
        if not self._held and chunk.endswith(b"\n\n") and b"\n\n" not in chunk[:-1] and b"\r" not in chunk:
            return self._event(chunk)  # one whole event
        # An end can only be in the new bytes, but for the few bytes of one that were there before.
        before = b"".join(self._held[-3:])[-3:] if self._held else b""
        if _end_of_event(before + chunk) < 0:
            return self._hold(chunk)
        return self._feed_whole(b"".join((*self._held, chunk)))

    def flush(self) -> bytes:
        """Return the bytes that are still held when the stream has ended."""
        held = b"".join((*self._waiting, *self._held))
        self._waiting, self._held, self._size = [], [], 0
        return held

    def _feed_whole(self, data: bytes) -> bytes:
        """Pass on the events that `data` begins with, and hold the rest of it."""
        out: list[bytes] = []
        start = 0
        self._held, self._size = [], sum(map(len, self._waiting))
        for end in (m.end() for m in _END_OF_EVENT.finditer(data)):
            out.append(self._event(data[start:end]))
            start = end
        if start < len(data):
            out.append(self._hold(data[start:]))
        return b"".join(out)

    def _feed_oversized(self, tail: bytes, chunk: bytes) -> bytes:
        """Pass on the next piece of an event that is too large to be held."""
        data = tail + chunk
        end = _end_of_event(data)
        if end < 0:
            self._tail = data[-3:]
            return chunk
        self._tail = None
        rest = data[end:]
        return chunk[: len(chunk) - len(rest)] + (self.feed(rest) if rest else b"")

    def _hold(self, piece: bytes) -> bytes:
        """Hold a piece of an event, or pass on everything held if it is too much."""
        self._held.append(piece)
        self._size += len(piece)
        if self._size <= self.MOST_HELD:
            return b""
        self._tail = b"".join(self._held[-3:])[-3:]
        return self.flush()

    def _event(self, event: bytes) -> bytes:
        if self.USAGE in event:
            return self._usage(event)
        if self.stamp is None and (self._waiting or self.FINISH in event):
            self._waiting.append(event)
            self._size += len(event)
            return b"" if self._size <= self.MOST_HELD else self.flush()
        return self._stamped(event)

    def _usage(self, event: bytes) -> bytes:
        found = self._STAMP.search(event)
        self.stamp = found[1] if found else b""
        waiting, self._waiting, self._size = self._waiting, [], 0
        return b"".join(self._stamped(one) for one in waiting)

    def _stamped(self, event: bytes) -> bytes:
        if not self.stamp or self.FINISH not in event:
            return event
        end = event.rindex(b"}")
        return event[:end] + self.stamp + event[end:]


def _end_of_event(data: bytes) -> int:
    """Where the first event in `data` ends, -1 if none does."""
    if b"\r" not in data:
        at = data.find(b"\n\n")
        return at + 2 if at >= 0 else -1
    found = _END_OF_EVENT.search(data)
    return found.end() if found else -1
