"""The SQL of searches for windows and sessions. The caller owns the transaction.

The index (`gateway.store.search_index`) finds messages. The windows and sessions that have one are those whose last
link is below the message's, so the links are followed from there.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import orjson

from gateway.dialects.search_text import Search, message_text
from gateway.records import Session, Window
from gateway.store import listed_rows, session_rows, window_rows
from gateway.store.database import Db
from gateway.store.types import Match, Saved, WindowQuery

_LISTED = 2000  # messages with a match, the newest, whose windows are listed
_RANKED = 20_000  # messages with a match, the newest, that are ranked
_ALIKE = 50  # windows, and sessions, with the same best message


class Found(NamedTuple):
    """A window or a session with a match."""

    kind: Literal["window", "session"]
    record: Window | Session
    match: Match

    @property
    def name(self) -> str:
        """The window's name, or the session's id."""
        return self.record.name if isinstance(self.record, Window) else self.record.id


class FoundWindows(NamedTuple):
    """One page of the windows with a match and what each has saved, how many there are, and the matches of the page."""

    windows: list[tuple[Window, Saved]]
    total: int
    matches: list[Match]
    truncated: bool


async def search_windows(db: Db, tenant: str, query: WindowQuery) -> FoundWindows:
    """Return one page of the windows that have `query.search` in their description or in a message."""
    wanted = Search(query.search or "")
    found = await db.words.hits(db, wanted, limit=_LISTED, ranked=False)
    names = await db.words.windows_with(db, tenant, found.contents) if found.contents else []
    page, total = await listed_rows.listed_windows(db, tenant, query, names)
    contents = set(found.contents)
    return FoundWindows(page, total, [await _match(db, one, wanted, contents) for one, _ in page], found.truncated)


async def _match(db: Db, window: Window, wanted: Search, contents: set[bytes]) -> Match:
    """Where a window matches: in its name, description or tags, or in the last message that does."""
    described = _match_in_description(window, wanted)
    link: bytes | None = None if described else window.transcript
    while link is not None:
        row = await db.one("SELECT parent, content, depth FROM links WHERE id = ?", link)
        if row is None:
            break
        if row[1] in contents:
            return await _match_in_message(db, wanted, row[1], row[2])
        link = row[0]
    return described or Match("name", window.name)


def _match_in_description(window: Window, wanted: Search) -> Match | None:
    """Where its words are, if name, description and tags have what a match needs."""
    texts = [("name", window.name), ("description", window.description), *(("tag", tag) for tag in window.tags)]
    fields = [_field_with(word.lower(), texts) for word in sorted(wanted.typed, key=len, reverse=True)]
    if not (all if wanted.every else any)(fields):
        return None
    name, text = next((field for field in fields if field), texts[0])
    return Match(name, wanted.snippet(text))


def _field_with(word: str, texts: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    return next((field for field in texts if word in field[1].lower()), None)


async def _match_in_message(db: Db, wanted: Search, content: bytes, depth: int) -> Match:
    row = await db.one("SELECT body FROM contents WHERE id = ?", content)
    message = orjson.loads(row[0]) if row else {}
    role = message.get("role")
    return Match("message", wanted.snippet(message_text(message)), depth, role if isinstance(role, str) else None)


async def search(db: Db, tenant: str, wanted: Search, limit: int) -> tuple[list[Found], bool]:
    """Return windows and sessions with a match, the best first, and whether there may be more.

    What is called that comes before what mentions it, unless some of the words are enough.
    """
    ranked = await db.words.hits(db, wanted, limit=_RANKED, ranked=True)
    described = [
        Found("window", window, _match_in_description(window, wanted) or Match("name", window.name))
        for window in await window_rows.described(db, tenant, wanted, limit)
    ]
    found: dict[tuple[str, str], Found] = {}
    _add(found, described if wanted.every else ())
    for content in ranked.contents:
        if len(found) > limit:
            break
        _add(found, await _mentions(db, tenant, wanted, content))
    _add(found, described)
    return list(found.values())[:limit], ranked.truncated or len(found) > limit


async def best_windows(db: Db, tenant: str, wanted: Search, limit: int, at: float) -> list[tuple[Window, Match]]:
    """Return windows that had not expired by then, the best match first.

    Of several with the same best message there is the newest, and none if one that is better has that message too.
    """
    found: dict[str, tuple[Window, Match]] = {}
    for content in (await db.words.hits(db, wanted, limit=_RANKED, ranked=True)).contents:
        usable = [
            (window, depth) for window, depth in (await _holders(db, tenant, content))[0] if not window.has_expired(at)
        ]
        if usable and not any(window.name in found for window, _ in usable):
            window, depth = usable[0]
            found[window.name] = window, await _match_in_message(db, wanted, content, depth)
        if len(found) == limit:
            break
    for window in await window_rows.described(db, tenant, wanted, _ALIKE):
        has_text = any(window.transcript == one.transcript for one, _ in found.values())
        if len(found) < limit and not has_text and not window.has_expired(at):
            match = _match_in_description(window, wanted) or Match("name", window.name)
            found.setdefault(window.name, (window, match))
    return list(found.values())


def _add(found: dict[tuple[str, str], Found], more: Iterable[Found]) -> None:
    for one in more:
        found.setdefault((one.kind, one.name), one)


async def _mentions(db: Db, tenant: str, wanted: Search, content: bytes) -> list[Found]:
    """Windows and sessions with a message."""
    windows, sessions = await _holders(db, tenant, content)
    holders: list[tuple[Literal["window", "session"], Window | Session, int]] = [
        *(("window", window, depth) for window, depth in windows),
        *(("session", session, depth) for session, depth in sessions),
    ]
    return [Found(kind, record, await _match_in_message(db, wanted, content, depth)) for kind, record, depth in holders]


async def _holders(db: Db, tenant: str, content: bytes) -> tuple[list[tuple[Window, int]], list[tuple[Session, int]]]:
    """The windows and the sessions with a message, each newest first, with its place in the text."""
    below = """WITH RECURSIVE below (link, depth) AS (
        SELECT id, depth FROM links WHERE content = ?
        UNION SELECT l.id, b.depth FROM below b JOIN links l ON l.parent = b.link)"""
    windows = await db.all(
        f"""{below} SELECT b.depth, w.name FROM below b CROSS JOIN windows w ON w.transcript = b.link
        WHERE +w.tenant = ? ORDER BY w.created_at DESC LIMIT ?""",
        content,
        tenant,
        _ALIKE,
    )
    sessions = await db.all(
        f"""{below} SELECT b.depth, s.id FROM below b CROSS JOIN sessions s ON s.transcript = b.link
        WHERE +s.tenant = ? ORDER BY s.last_active_at DESC LIMIT ?""",
        content,
        tenant,
        _ALIKE,
    )
    return (
        [(window, depth) for depth, name in windows if (window := await window_rows.window(db, tenant, name))],
        [(session, depth) for depth, name in sessions if (session := await session_rows.session(db, tenant, name))],
    )
