"""The SQL of the SQLite store: plain functions that take a connection. Whoever calls them owns the transaction."""

import sqlite3
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import orjson
from blake3 import blake3

from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey
from gateway.records import Manifest, Message, PinnedObject, Session, SessionState, Turn, Usage, Window
from gateway.store.contract import Finished, WindowQuery

_SESSION_COLUMNS = tuple(f.name for f in fields(Session))
_WINDOW_COLUMNS = tuple(f.name for f in fields(Window))
_SESSION = f"SELECT {', '.join(_SESSION_COLUMNS)} FROM sessions"
_WINDOW = f"SELECT {', '.join(_WINDOW_COLUMNS)} FROM windows"
_SORT = {"name": "name", "created_at": "created_at", "token_count": "token_count", "size": "size_bytes"}
_ID_BYTES = 16
_VARIABLES = 500  # per statement; SQLite's own limit is higher, its parser is not faster for it


# --- sessions and turns


def session(db: sqlite3.Connection, tenant: str, session_id: str) -> Session | None:
    row = db.execute(f"{_SESSION} WHERE tenant = ? AND id = ?", (tenant, session_id)).fetchone()
    return Session(*row) if row else None


def list_sessions(
    db: sqlite3.Connection, tenant: str, state: SessionState | None, model: str | None, limit: int, offset: int
) -> tuple[list[Session], int]:
    where, values = "WHERE tenant = ? AND (? IS NULL OR state = ?) AND (? IS NULL OR model = ?)", (
        tenant, state, state, model, model,
    )  # fmt: skip
    (total,) = db.execute(f"SELECT count(*) FROM sessions {where}", values).fetchone()
    page = db.execute(f"{_SESSION} {where} ORDER BY last_active_at DESC, id LIMIT ? OFFSET ?", (*values, limit, offset))
    return [Session(*row) for row in page], total


def add_session(db: sqlite3.Connection, new: Session) -> bool:
    marks = ", ".join("?" * len(_SESSION_COLUMNS))
    values = [getattr(new, name) for name in _SESSION_COLUMNS]
    cursor = db.execute(f"INSERT OR IGNORE INTO sessions ({', '.join(_SESSION_COLUMNS)}) VALUES ({marks})", values)
    return cursor.rowcount == 1


def set_frozen(db: sqlite3.Connection, tenant: str, session_id: str, turn_count: int, at: float) -> None:
    db.execute(
        "UPDATE sessions SET state = 'frozen', frozen_at = ? WHERE tenant = ? AND id = ? AND turn_count = ?",
        (at, tenant, session_id, turn_count),
    )


def delete_session(db: sqlite3.Connection, tenant: str, session_id: str) -> bool:
    db.execute("DELETE FROM turns WHERE tenant = ? AND session_id = ?", (tenant, session_id))
    gone = db.execute("DELETE FROM sessions WHERE tenant = ? AND id = ?", (tenant, session_id)).rowcount == 1
    _collect(db)
    return gone


def record(db: sqlite3.Connection, finished: Sequence[Finished], turns_kept: int) -> None:
    by_session: dict[tuple[str, str], list[Finished]] = {}
    for item in finished:
        by_session.setdefault((item.turn.tenant, item.turn.session_id), []).append(item)
    for items in by_session.values():
        _move_on(db, items)
        for item in items:
            _add_turn(db, item.turn)
        _prune_turns(db, items[-1].turn, turns_kept)


def _move_on(db: sqlite3.Connection, items: Sequence[Finished]) -> None:
    """Bring a session to its last turn whose reply is known; the transcripts between are part of that one or gone."""
    moving = [item for item in items if item.messages is not None]
    last = moving[-1] if moving else items[-1]
    turn, first = last.turn, items[0].turn
    new = Session(turn.tenant, turn.session_id, last.lineage, turn.model, created_at=first.started_at)
    add_session(db, new)
    now = max(item.turn.started_at + item.turn.duration_ms / 1000 for item in items)
    if last.messages is None:
        db.execute(
            "UPDATE sessions SET last_active_at = max(last_active_at, ?) WHERE tenant = ? AND id = ?",
            (now, turn.tenant, turn.session_id),
        )
        return
    tokens = turn.usage.prompt + turn.usage.completion if turn.usage else None
    db.execute(
        """UPDATE sessions SET last_active_at = max(last_active_at, ?), turn_count = turn_count + ?, state = 'active',
        model = ?, fingerprint = ?, salt = ?, token_count = coalesce(?, token_count), transcript = ?, frame = ?
        WHERE tenant = ? AND id = ?""",
        (
            now, len(moving), turn.model, last.fingerprint, last.salt, tokens, _add_transcript(db, last.messages),
            _add_content(db, last.frame), turn.tenant, turn.session_id,
        ),
    )  # fmt: skip


def _add_turn(db: sqlite3.Connection, turn: Turn) -> None:
    usage = turn.usage
    db.execute(
        "INSERT INTO turns VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            turn.tenant, turn.session_id, turn.model, turn.outcome, turn.status, turn.started_at, turn.duration_ms,
            usage and usage.prompt, usage and usage.completion, usage and usage.cached, turn.detail,
        ),
    )  # fmt: skip


def _prune_turns(db: sqlite3.Connection, turn: Turn, keep: int) -> None:
    db.execute(
        """DELETE FROM turns WHERE tenant = ?1 AND session_id = ?2 AND id <= (
            SELECT id FROM turns WHERE tenant = ?1 AND session_id = ?2 ORDER BY id DESC LIMIT 1 OFFSET ?3)""",
        (turn.tenant, turn.session_id, keep),
    )


def turns(db: sqlite3.Connection, tenant: str, session_id: str, limit: int) -> list[Turn]:
    found = db.execute(
        """SELECT model, outcome, status, started_at, duration_ms,
            prompt_tokens, completion_tokens, cached_tokens, detail
        FROM turns WHERE tenant = ? AND session_id = ? ORDER BY id DESC LIMIT ?""",
        (tenant, session_id, limit),
    )
    return [
        Turn(tenant, session_id, model, outcome, status, at, ms, None if p is None else Usage(p, c, cached), detail)
        for model, outcome, status, at, ms, p, c, cached, detail in found
    ]


# --- transcripts: contents by hash, and Merkle lists of them


def messages(db: sqlite3.Connection, transcript: bytes) -> list[Message]:
    found = db.execute(
        """WITH RECURSIVE chain (parent, content, depth) AS (
            SELECT parent, content, depth FROM links WHERE id = ?
            UNION ALL SELECT l.parent, l.content, l.depth FROM links l JOIN chain c ON l.id = c.parent)
        SELECT body FROM chain JOIN contents ON contents.id = chain.content ORDER BY depth""",
        (transcript,),
    )
    return [orjson.loads(body) for (body,) in found]


def content(db: sqlite3.Connection, content_id: bytes) -> dict[str, Any]:
    (body,) = db.execute("SELECT body FROM contents WHERE id = ?", (content_id,)).fetchone()
    value: dict[str, Any] = orjson.loads(body)
    return value


def _add_content(db: sqlite3.Connection, value: Mapping[str, object]) -> bytes:
    content_id, body = _content(value)
    db.execute("INSERT OR IGNORE INTO contents VALUES (?, ?)", (content_id, body))
    return content_id


def _add_transcript(db: sqlite3.Connection, transcript: Sequence[Message]) -> bytes | None:
    chain: list[tuple[bytes, bytes | None, bytes, bytes]] = []
    parent: bytes | None = None
    for message in transcript:
        content_id, body = _content(message)
        link = blake3((parent or b"") + content_id).digest(_ID_BYTES)
        chain.append((link, parent, content_id, body))
        parent = link
    known = len(chain)
    # From the end: all but the last turn's messages are there already.
    while known and not db.execute("SELECT 1 FROM links WHERE id = ?", (chain[known - 1][0],)).fetchone():
        known -= 1
    for depth, (link, before, content_id, body) in enumerate(chain[known:], start=known):
        db.execute("INSERT OR IGNORE INTO contents VALUES (?, ?)", (content_id, body))
        db.execute("INSERT INTO links VALUES (?, ?, ?, ?)", (link, before, content_id, depth))
    return parent


def _content(value: Mapping[str, object]) -> tuple[bytes, bytes]:
    body = orjson.dumps(value)
    return blake3(body).digest(_ID_BYTES), body


def _collect(db: sqlite3.Connection) -> None:
    """Delete links and contents that no session and no window reaches."""
    db.execute(
        """WITH RECURSIVE reached (id) AS (
            SELECT transcript FROM sessions WHERE transcript IS NOT NULL
            UNION SELECT window_transcript FROM sessions WHERE window_transcript IS NOT NULL
            UNION SELECT transcript FROM windows
            UNION SELECT l.parent FROM links l JOIN reached r ON l.id = r.id WHERE l.parent IS NOT NULL)
        DELETE FROM links WHERE id NOT IN (SELECT id FROM reached)"""
    )
    db.execute(
        """DELETE FROM contents WHERE id NOT IN (
            SELECT content FROM links
            UNION SELECT frame FROM sessions WHERE frame IS NOT NULL
            UNION SELECT frame FROM windows WHERE frame IS NOT NULL)"""
    )


# --- windows


def _window(row: Sequence[Any]) -> Window:
    values = dict(zip(_WINDOW_COLUMNS, row, strict=True))
    values["tags"] = tuple(orjson.loads(values["tags"]))
    values["receipt"] = orjson.loads(values["receipt"])
    return Window(**values)


def window(db: sqlite3.Connection, tenant: str, name: str) -> Window | None:
    row = db.execute(f"{_WINDOW} WHERE tenant = ? AND name = ?", (tenant, name)).fetchone()
    return _window(row) if row else None


def list_windows(db: sqlite3.Connection, tenant: str, query: WindowQuery) -> tuple[list[Window], int]:
    where, values = _where(tenant, query)
    order = f"{_SORT[query.sort_by]} {'DESC' if query.descending else 'ASC'}, name"
    (total,) = db.execute(f"SELECT count(*) FROM windows WHERE {where}", values).fetchone()
    page = db.execute(
        f"{_WINDOW} WHERE {where} ORDER BY {order} LIMIT ? OFFSET ?", (*values, query.limit, query.offset)
    )
    return [_window(row) for row in page], total


def _where(tenant: str, query: WindowQuery) -> tuple[str, list[object]]:
    terms: list[tuple[str, Sequence[object]]] = [("tenant = ?", [tenant])]
    if query.model is not None:
        terms.append(("model = ?", [query.model]))
    if query.session_id is not None:
        terms.append(("session_id = ?", [query.session_id]))
    if query.created_after is not None:
        terms.append(("created_at > ?", [query.created_after]))
    if query.created_before is not None:
        terms.append(("created_at < ?", [query.created_before]))
    if query.search is not None:
        terms.append(("(instr(lower(name), lower(?)) OR instr(lower(description), lower(?)))", [query.search] * 2))
    for tag in query.tags:
        terms.append(("name IN (SELECT name FROM window_tags WHERE tenant = ? AND tag = ?)", [tenant, tag]))
    return " AND ".join(term for term, _ in terms), [value for _, values in terms for value in values]


def lineage(db: sqlite3.Connection, tenant: str, name: str) -> tuple[list[str], list[str]]:
    ancestors = db.execute(
        """WITH RECURSIVE up (parent, depth) AS (
            SELECT parent, 0 FROM windows WHERE tenant = ?1 AND name = ?2
            UNION SELECT w.parent, up.depth + 1 FROM windows w JOIN up ON w.name = up.parent AND w.tenant = ?1
            WHERE up.depth < 1000)
        SELECT parent FROM up WHERE parent IS NOT NULL ORDER BY depth""",
        (tenant, name),
    ).fetchall()
    clones = db.execute("SELECT name FROM windows WHERE tenant = ? AND parent = ? ORDER BY name", (tenant, name))
    return [parent for (parent,) in ancestors], [clone for (clone,) in clones]


def add_window(db: sqlite3.Connection, new: Window, manifest: Manifest | None) -> bool:
    if db.execute("SELECT 1 FROM windows WHERE tenant = ? AND name = ?", (new.tenant, new.name)).fetchone():
        return False
    if manifest is not None:
        _add_manifest(db, manifest)
    values = {name: getattr(new, name) for name in _WINDOW_COLUMNS}
    values["parent"] = new.parent if new.parent and window(db, new.tenant, new.parent) else None
    values["tags"] = orjson.dumps(new.tags).decode()
    values["receipt"] = orjson.dumps(dict(new.receipt)).decode()
    marks = ", ".join("?" * len(values))
    db.execute(f"INSERT INTO windows ({', '.join(values)}) VALUES ({marks})", tuple(values.values()))
    db.executemany("INSERT INTO window_tags VALUES (?, ?, ?)", [(new.tenant, tag, new.name) for tag in new.tags])
    return True


def _add_manifest(db: sqlite3.Connection, new: Manifest) -> None:
    db.execute("INSERT INTO manifests VALUES (?, ?)", (new.id, array("I", new.token_ids).tobytes()))
    db.executemany(
        "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?)",
        [(o.key, o.tier, o.size, o.checksum) for o in new.objects],
    )
    positions = {key: i for i, key in enumerate(dict.fromkeys(o.key for o in new.objects))}
    db.executemany(
        "INSERT INTO manifest_objects VALUES (?, ?, ?, ?)",
        [(new.id, positions[o.key], o.key, o.tier) for o in new.objects],
    )


def manifest(db: sqlite3.Connection, manifest_id: str) -> Manifest:
    row = db.execute("SELECT token_ids FROM manifests WHERE id = ?", (manifest_id,)).fetchone()
    if row is None:
        raise GatewayError("window_not_found", "the window was deleted just now")
    found = db.execute(
        """SELECT o.key, o.tier, o.size, o.checksum FROM manifest_objects m JOIN objects o USING (key, tier)
        WHERE m.manifest = ? ORDER BY m.position, m.tier""",
        (manifest_id,),
    )
    return Manifest(manifest_id, tuple(array("I", row[0])), tuple(PinnedObject(*row) for row in found))


def delete_window(db: sqlite3.Connection, tenant: str, name: str) -> list[ObjectKey] | None:
    row = db.execute("SELECT manifest FROM windows WHERE tenant = ? AND name = ?", (tenant, name)).fetchone()
    if row is None:
        return None
    (held,) = row
    db.execute("DELETE FROM windows WHERE tenant = ? AND name = ?", (tenant, name))
    # Whoever gets the name next is a stranger to what came from this one.
    db.execute("UPDATE windows SET parent = NULL WHERE tenant = ? AND parent = ?", (tenant, name))
    db.execute("UPDATE sessions SET window = NULL WHERE tenant = ? AND window = ?", (tenant, name))
    _collect(db)
    if db.execute("SELECT 1 FROM windows WHERE manifest = ?", (held,)).fetchone():
        return []
    mine = [key for (key,) in db.execute("SELECT DISTINCT key FROM manifest_objects WHERE manifest = ?", (held,))]
    db.execute("DELETE FROM manifest_objects WHERE manifest = ?", (held,))
    db.execute("DELETE FROM manifests WHERE id = ?", (held,))
    orphans = [
        k for k in mine if not db.execute("SELECT 1 FROM manifest_objects WHERE key = ? LIMIT 1", (k,)).fetchone()
    ]
    db.executemany("DELETE FROM objects WHERE key = ?", [(key,) for key in orphans])
    return [ObjectKey.parse(key) for key in orphans]


# --- objects


def objects(db: sqlite3.Connection, keys: Sequence[ObjectKey]) -> list[PinnedObject]:
    found: list[PinnedObject] = []
    for batch in _batches([str(key) for key in keys]):
        marks = ", ".join("?" * len(batch))
        cursor = db.execute(f"SELECT key, tier, size, checksum FROM objects WHERE key IN ({marks})", batch)
        found += [PinnedObject(*row) for row in cursor]
    return found


def held_objects(db: sqlite3.Connection) -> set[ObjectKey]:
    return {ObjectKey.parse(key) for (key,) in db.execute("SELECT DISTINCT key FROM objects")}


def lineage_in_use(db: sqlite3.Connection, tenant: str, name: str) -> bool:
    row = db.execute(
        "SELECT 1 FROM sessions WHERE tenant = ? AND lineage = ? AND state IN ('active', 'thawed') LIMIT 1",
        (tenant, name),
    ).fetchone()
    return row is not None


def window_counts(db: sqlite3.Connection) -> dict[str, int]:
    return dict(db.execute("SELECT kv, count(*) FROM windows GROUP BY kv"))


def tier_usage(db: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    found = db.execute("SELECT tier, count(*), sum(size) FROM objects GROUP BY tier")
    return {tier: (count, size) for tier, count, size in found}


def _batches(values: Sequence[str]) -> Iterable[Sequence[str]]:
    return (values[i : i + _VARIABLES] for i in range(0, len(values), _VARIABLES))
