"""The SQL that finds the windows and sessions with certain messages. The caller owns the transaction.

They are those whose last link is below a link of the message. A conversation may have thousands of messages with a
match, and the same message may begin thousands of conversations: so links are followed for many messages at once, each
link once, and only so many.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Literal, NamedTuple

from gateway.store.database import Db

_LINKS = 20_000  # that a search follows, and as many again if that is not enough
_NEWEST = 50  # windows, and sessions, that are looked through if that is not enough
_AT_ONCE = (25, 100, 400)  # messages: mostly the best ones are enough for what a search returns
# A row for each link, and one for each window and session that ends there.
_HOLDERS = """SELECT '' AS kind, '' AS name, 0.0 AS at, link, parent, content, depth FROM followed
    UNION ALL SELECT 'window', w.name, w.created_at, f.link, f.parent, f.content, f.depth
        FROM followed f CROSS JOIN windows w ON w.transcript = f.link WHERE +w.tenant = ?1
    UNION ALL SELECT 'session', s.id, s.last_active_at, f.link, f.parent, f.content, f.depth
        FROM followed f CROSS JOIN sessions s ON s.transcript = f.link WHERE +s.tenant = ?1"""
_DOWN = f"""WITH RECURSIVE below (link, parent, content, depth) AS (
        SELECT id, parent, content, depth FROM links WHERE content IN ({{contents}})
        UNION SELECT l.id, l.parent, l.content, l.depth FROM below b CROSS JOIN links l ON l.parent = b.link
            LIMIT ?2 /* SQLite */),
    followed AS MATERIALIZED (SELECT * FROM below LIMIT ?2)
    {_HOLDERS}"""
_UP = f"""WITH RECURSIVE ends (link) AS (
        SELECT transcript FROM (
            SELECT transcript FROM windows WHERE tenant = ?1 ORDER BY created_at DESC LIMIT ?3) w
        UNION SELECT transcript FROM (
            SELECT transcript FROM sessions WHERE tenant = ?1 ORDER BY last_active_at DESC LIMIT ?3) s),
    above (link, parent, content, depth) AS (
        SELECT l.id, l.parent, l.content, l.depth FROM ends e CROSS JOIN links l ON l.id = e.link
        UNION SELECT l.id, l.parent, l.content, l.depth FROM above a CROSS JOIN links l ON l.id = a.parent
            LIMIT ?2 /* SQLite */),
    followed AS MATERIALIZED (SELECT * FROM above LIMIT ?2)
    {_HOLDERS}"""


class Holder(NamedTuple):
    """A window or a session that has a message, and since when."""

    kind: Literal["window", "session"]
    name: str
    at: float


class _Link(NamedTuple):
    link: bytes
    parent: bytes | None
    content: bytes
    depth: int


class _Place(NamedTuple):
    """A message that a text has, and the one before it of those that are looked for."""

    content: bytes
    depth: int
    before: "_Place | None"


class Holders:
    """Looks for the windows and sessions of a tenant that have messages. `complete`: it found all of them."""

    def __init__(self, db: Db, tenant: str, links: int = _LINKS) -> None:
        self.complete = True
        self._db = db
        self._tenant = tenant
        self._most = self._left = links
        self._links: dict[bytes, _Link] = {}
        self._ends: dict[Holder, bytes] = {}

    async def of(self, contents: Sequence[bytes]) -> dict[bytes, list[tuple[Holder, int]]]:
        """Return those that have each message, and its place there: windows first, and each kind newest first."""
        if self.complete:
            padded = _padded(contents)
            followed = await self._follow(_DOWN.format(contents=_numbered(padded)), self._left, *padded)
            self._left -= followed
            if not self._left:
                self.complete = False
                await self._follow(_UP, self._most, _NEWEST)
        places = self._places(frozenset(contents))
        found: dict[bytes, list[tuple[Holder, int]]] = {content: [] for content in contents}
        for holder in sorted(self._ends, key=lambda one: (one.kind == "session", -one.at)):
            for place in _each(places.get(self._ends[holder])):
                found[place.content].append((holder, place.depth))
        return found

    async def _follow(self, query: str, *args: object) -> int:
        """Add the links and those whose texts end there; return how many links it were."""
        count = 0
        for kind, name, at, *row in await self._db.all(query, self._tenant, *args):
            link = _Link(*row)
            if kind:
                self._ends[Holder(kind, name, at)] = link.link
            else:
                self._links[link.link] = link
                count += 1
        return count

    def _places(self, wanted: frozenset[bytes]) -> dict[bytes, _Place | None]:
        """The last of these messages at or above each link that was followed."""
        places: dict[bytes | None, _Place | None] = {}
        for link, parent, content, depth in sorted(self._links.values(), key=lambda one: one.depth):
            before = places.get(parent)
            places[link] = _Place(content, depth, before) if content in wanted else before
        return places  # type: ignore[return-value]


def at_once(contents: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Messages, the best first, in the portions in which they are looked for."""
    start = 0
    for size in chain(_AT_ONCE, repeat(_AT_ONCE[-1])):
        if not (part := contents[start : start + size]):
            break
        yield part
        start += size


def _each(place: _Place | None) -> Iterator[_Place]:
    while place is not None:
        yield place
        place = place.before


def _padded(contents: Sequence[bytes]) -> Sequence[bytes]:
    """Some of them repeated, so that there are few lengths, and few statements."""
    size = next(size for size in _AT_ONCE if size >= len(contents))
    return [*contents, *repeat(contents[-1], size - len(contents))]


def _numbered(contents: Sequence[bytes]) -> str:
    return ", ".join(f"?{number}" for number, _ in enumerate(contents, 3))
