"""The SQL of searches for windows and sessions. The caller owns the transaction.

The index (`gateway.store.search_index`) finds messages, and `gateway.store.holder_rows` the windows and sessions that
have them.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import orjson

from gateway.dialects.search_text import Search, message_text
from gateway.records import Session, Window
from gateway.store import listed_rows, session_rows, window_rows
from gateway.store.database import Db
from gateway.store.holder_rows import Holder, Holders, at_once
from gateway.store.types import Match, Saved, WindowQuery

_LISTED = 2000  # messages with a match, the newest, whose windows are listed
_RANKED = 20_000  # messages with a match, the newest, that are ranked
_ALIKE = 50  # windows with the same best message
_LISTED_FIRST = 25  # messages whose links are followed together at first, then twice as many, and so on
# That are followed until no more messages are taken, and together: one conversation may have so many.
_LINKS, _MOST_LINKS = 3_000, 20_000
Having = tuple[bytes, Sequence[tuple[Holder, int]]]


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
    last, truncated = await _windows_with(db, tenant, found.contents)
    page, total = await listed_rows.listed_windows(db, tenant, query, list(last))
    matches = [await _match(db, one, wanted, last.get(one.name)) for one, _ in page]
    return FoundWindows(page, total, matches, found.truncated or truncated)


async def _windows_with(db: Db, tenant: str, contents: Sequence[bytes]) -> tuple[dict[str, tuple[bytes, int]], bool]:
    """The windows with these messages, each with the last of them and its place, and whether there may be more."""
    last: dict[str, tuple[bytes, int]] = {}
    followed, start, size = 0, 0, _LISTED_FIRST
    while start < len(contents):
        if followed >= _LINKS:
            return last, True
        links, rows = await db.words.windows_with(db, tenant, contents[start : start + size], _MOST_LINKS)
        followed, start, size = followed + links, start + size, 2 * size
        for name, content, depth in rows:
            if name not in last or last[name][1] < depth:
                last[name] = content, depth
    return last, followed >= _MOST_LINKS


async def _match(db: Db, window: Window, wanted: Search, last: tuple[bytes, int] | None) -> Match:
    """Where a window matches: in its name, description or tags, or in the `last` message that does."""
    described = _match_in_description(window, wanted)
    if described or last is None:
        return described or Match("name", window.name)
    return await _match_in_message(db, wanted, *last)


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
    holders = Holders(db, tenant)
    for contents in at_once(ranked.contents):
        for content, those in (await holders.of(contents)).items():
            await _add_mentions(db, tenant, wanted, found, (content, those), limit)
        if len(found) > limit:
            break
    _add(found, described)
    truncated = ranked.truncated or not holders.complete or len(found) > limit
    return list(found.values())[:limit], truncated


async def best_windows(db: Db, tenant: str, wanted: Search, limit: int, at: float) -> list[tuple[Window, Match]]:
    """Return windows that had not expired by then, the best match first.

    Of several with the same best message there is the newest, and none if one that is better has that message too.
    """
    found: dict[str, tuple[Window, Match]] = {}
    ranked = await db.words.hits(db, wanted, limit=_RANKED, ranked=True)
    holders = Holders(db, tenant)
    for contents in at_once(ranked.contents):
        for content, those in (await holders.of(contents)).items():
            places = {holder.name: depth for holder, depth in those if holder.kind == "window"}
            if len(found) < limit and not places.keys() & found.keys():
                newest = await _first_usable(db, tenant, list(places)[:_ALIKE], at)
                if newest:
                    match = await _match_in_message(db, wanted, content, places[newest.name])
                    found[newest.name] = newest, match
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


async def _first_usable(db: Db, tenant: str, names: Iterable[str], at: float) -> Window | None:
    for name in names:
        window = await window_rows.window(db, tenant, name)
        if window and not window.has_expired(at):
            return window
    return None


async def _add_mentions(
    db: Db, tenant: str, wanted: Search, found: dict[tuple[str, str], Found], having: Having, limit: int
) -> None:
    """Add the windows and sessions that have a message, until there are more than `limit`."""
    content, holders = having
    for holder, depth in holders:
        if len(found) > limit:
            return
        if (holder.kind, holder.name) in found:
            continue
        of_kind = window_rows.window if holder.kind == "window" else session_rows.session
        record: Window | Session | None = await of_kind(db, tenant, holder.name)
        if record:
            match = await _match_in_message(db, wanted, content, depth)
            found[holder.kind, holder.name] = Found(holder.kind, record, match)
