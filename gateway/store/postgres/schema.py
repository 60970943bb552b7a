"""The schema on PostgreSQL. Its first step is SQLite's as of `BASE`, and its later ones have the same numbers.

A later step is added to both: as it is, if it has only what `translated_schema` translates, else in its own words. It
adds first, and what is not used any more is removed one release later, because old and new gateways run side by side
while they are updated. A step that those of the release before can work with is listed in `COMPATIBLE`: they may then
start on it, too.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from gateway.errors import StartError
from gateway.store import schema
from gateway.store.postgres.sql import translated_schema

if TYPE_CHECKING:
    import asyncpg

BASE = 21
_MIGRATING = 7_236_801  # the advisory lock of the gateway that migrates; any number that is ours
_SERVER = 150_000  # PostgreSQL 15

_TABLES = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "INSERT INTO meta VALUES ('store_id', substr(md5(random()::text || clock_timestamp()::text), 1, 12))",
    "CREATE TABLE contents (id BLOB PRIMARY KEY, body BLOB NOT NULL)",
    """CREATE TABLE links (
        id BLOB PRIMARY KEY, parent BLOB, content BLOB NOT NULL REFERENCES contents (id), depth INTEGER NOT NULL
    )""",
    """CREATE TABLE sessions (
        tenant TEXT NOT NULL, id TEXT NOT NULL, lineage TEXT NOT NULL, model TEXT NOT NULL, fingerprint TEXT NOT NULL,
        salt TEXT NOT NULL, state TEXT NOT NULL, token_count INTEGER NOT NULL, turn_count INTEGER NOT NULL,
        transcript BLOB, frame BLOB, "window" TEXT, window_transcript BLOB, created_at REAL NOT NULL,
        last_active_at REAL NOT NULL, frozen_at REAL, source TEXT NOT NULL DEFAULT '', parent TEXT,
        first_message_hash BLOB, last_request_hash BLOB, last_reply_hash BLOB,
        answered BOOLEAN NOT NULL DEFAULT FALSE, prompt_tokens INTEGER NOT NULL DEFAULT 0,
        engine TEXT NOT NULL DEFAULT '', normalised TEXT NOT NULL DEFAULT '', successor TEXT, title TEXT,
        rewinds INTEGER NOT NULL DEFAULT 0, booked_tokens INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (tenant, id)
    )""",
    """CREATE TABLE turns (
        id INTEGER PRIMARY KEY, tenant TEXT NOT NULL, session_id TEXT NOT NULL, model TEXT NOT NULL,
        outcome TEXT NOT NULL, status INTEGER NOT NULL, started_at REAL NOT NULL, duration_ms REAL NOT NULL,
        prompt_tokens INTEGER, completion_tokens INTEGER, cached_tokens INTEGER, detail TEXT NOT NULL,
        source TEXT NOT NULL DEFAULT '', engine TEXT NOT NULL DEFAULT '', estimated_tokens INTEGER,
        expected_tokens INTEGER, miss TEXT NOT NULL DEFAULT '', first_token_ms REAL
    )""",
    """CREATE TABLE session_prefixes (
        tenant TEXT NOT NULL, link BLOB NOT NULL, session_id TEXT NOT NULL, PRIMARY KEY (tenant, link, session_id)
    )""",
    """CREATE TABLE reply_aliases (
        tenant TEXT NOT NULL, link BLOB NOT NULL, history BLOB NOT NULL, question BLOB NOT NULL,
        session_id TEXT NOT NULL, reply_hash BLOB NOT NULL, marks BLOB NOT NULL,
        PRIMARY KEY (tenant, link, history, question, session_id)
    )""",
    """CREATE TABLE session_salts (
        salt TEXT NOT NULL, tenant TEXT NOT NULL, session_id TEXT NOT NULL, PRIMARY KEY (salt, tenant, session_id)
    )""",
    """CREATE TABLE orphaned_salts (
        salt TEXT PRIMARY KEY, tenant TEXT NOT NULL, lineage TEXT NOT NULL, since REAL NOT NULL
    )""",
    """CREATE TABLE successions (
        tenant TEXT NOT NULL, session_id TEXT NOT NULL, successor TEXT NOT NULL, "window" TEXT NOT NULL,
        dropped INTEGER NOT NULL, link BLOB NOT NULL, PRIMARY KEY (tenant, session_id)
    )""",
    """CREATE TABLE responses (
        number INTEGER PRIMARY KEY, tenant TEXT NOT NULL, id TEXT NOT NULL, session_id TEXT NOT NULL,
        lineage TEXT NOT NULL, created_at REAL NOT NULL, answer BLOB NOT NULL, echo BLOB NOT NULL,
        instructed BOOLEAN NOT NULL, transcript BLOB, request_input BLOB, UNIQUE (tenant, id)
    )""",
    """CREATE TABLE response_items (
        tenant TEXT NOT NULL, id TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (tenant, id)
    )""",
    "CREATE TABLE manifests (id TEXT PRIMARY KEY, token_ids BLOB NOT NULL)",
    """CREATE TABLE objects (
        number INTEGER PRIMARY KEY, key TEXT NOT NULL, tier TEXT NOT NULL, size INTEGER NOT NULL,
        checksum BLOB NOT NULL, UNIQUE (key, tier)
    )""",
    """CREATE TABLE manifest_objects (
        manifest TEXT NOT NULL REFERENCES manifests (id), position INTEGER NOT NULL,
        object INTEGER NOT NULL REFERENCES objects (number), PRIMARY KEY (manifest, position, object)
    )""",
    """CREATE TABLE windows (
        tenant TEXT NOT NULL, name TEXT NOT NULL, session_id TEXT NOT NULL, lineage TEXT NOT NULL, salt TEXT NOT NULL,
        model TEXT NOT NULL, model_root TEXT NOT NULL, fingerprint TEXT NOT NULL, world_size INTEGER NOT NULL,
        token_count INTEGER NOT NULL, chunk_size INTEGER NOT NULL, chunk_count INTEGER NOT NULL,
        size_bytes INTEGER NOT NULL, kv TEXT NOT NULL, transcript BLOB NOT NULL, frame BLOB,
        manifest TEXT NOT NULL REFERENCES manifests (id), created_at REAL NOT NULL, description TEXT NOT NULL,
        tags TEXT NOT NULL, parent TEXT, expires_at REAL, receipt TEXT NOT NULL, pin_salt TEXT NOT NULL DEFAULT '',
        title TEXT, PRIMARY KEY (tenant, name)
    )""",
    """CREATE TABLE window_tags (
        tenant TEXT NOT NULL, tag TEXT NOT NULL, name TEXT NOT NULL, PRIMARY KEY (tenant, tag, name),
        FOREIGN KEY (tenant, name) REFERENCES windows (tenant, name) ON DELETE CASCADE
    )""",
    """CREATE TABLE auto_freezes (
        tenant TEXT NOT NULL, session_id TEXT NOT NULL, claimed_until REAL NOT NULL DEFAULT 0,
        not_before REAL NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0,
        covered_tokens INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (tenant, session_id),
        FOREIGN KEY (tenant, session_id) REFERENCES sessions (tenant, id) ON DELETE CASCADE DEFERRABLE
    )""",
    """CREATE TABLE auto_windows (
        number INTEGER PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, session_id TEXT NOT NULL,
        UNIQUE (tenant, name), FOREIGN KEY (tenant, name) REFERENCES windows (tenant, name) ON DELETE CASCADE
    )""",
    """CREATE TABLE prefill_curves (
        id INTEGER PRIMARY KEY, engine TEXT NOT NULL, fingerprint TEXT NOT NULL, model TEXT NOT NULL,
        began_at REAL NOT NULL, samples INTEGER NOT NULL DEFAULT 0, reach INTEGER NOT NULL DEFAULT 0,
        per_request REAL, per_token REAL, per_pair REAL, error_share REAL
    )""",
    """CREATE TABLE prefill_samples (
        number INTEGER PRIMARY KEY, curve INTEGER NOT NULL REFERENCES prefill_curves (id),
        size_class INTEGER NOT NULL, computed INTEGER NOT NULL, cached INTEGER NOT NULL, seconds REAL NOT NULL,
        predicted REAL
    )""",
    """CREATE TABLE savings (
        tenant TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, curve INTEGER NOT NULL, source TEXT NOT NULL,
        requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, tokens INTEGER NOT NULL, seconds REAL NOT NULL,
        unpriced_tokens INTEGER NOT NULL, unpriced_squares INTEGER NOT NULL, unpriced_longest INTEGER NOT NULL,
        since REAL NOT NULL, PRIMARY KEY (tenant, kind, name, curve, source)
    )""",
    """CREATE TABLE held_kv (
        id INTEGER PRIMARY KEY, bytes INTEGER NOT NULL, byte_hours REAL NOT NULL, since REAL NOT NULL, at REAL NOT NULL
    )""",
    # The full-text index (`gateway.store.postgres.words`). What is to be indexed is in `unindexed`: numbers are not
    # given in the order in which transactions end, so no position says what has been.
    "CREATE TABLE searchable (number INTEGER PRIMARY KEY, content BLOB NOT NULL UNIQUE, words tsvector NOT NULL)",
    """CREATE TABLE unindexed (
        number INTEGER PRIMARY KEY, content BLOB NOT NULL REFERENCES contents (id) ON DELETE CASCADE
    )""",
)
_INDEXES = (
    "CREATE INDEX auto_windows_by_session ON auto_windows (tenant, session_id)",
    "CREATE INDEX links_by_parent ON links (parent)",
    "CREATE INDEX links_by_content ON links (content)",
    "CREATE INDEX manifest_objects_by_object ON manifest_objects (object)",
    "CREATE INDEX prefill_curves_by_engine ON prefill_curves (engine, fingerprint, id)",
    "CREATE INDEX prefill_samples_by_curve ON prefill_samples (curve, size_class, number)",
    "CREATE INDEX reply_aliases_by_session ON reply_aliases (tenant, session_id)",
    "CREATE INDEX response_items_by_number ON response_items (number)",
    "CREATE INDEX responses_by_age ON responses (tenant, number)",
    "CREATE INDEX responses_by_session ON responses (tenant, session_id)",
    "CREATE INDEX responses_by_transcript ON responses (transcript)",
    "CREATE INDEX responses_by_input ON responses (request_input)",
    "CREATE INDEX responses_by_echo ON responses (echo)",
    "CREATE INDEX savings_unpriced ON savings (curve) WHERE unpriced_tokens > 0",
    "CREATE INDEX searchable_words ON searchable USING gin (words)",
    "CREATE INDEX session_prefixes_by_session ON session_prefixes (tenant, session_id)",
    "CREATE INDEX session_salts_by_session ON session_salts (tenant, session_id)",
    "CREATE INDEX sessions_by_activity ON sessions (tenant, last_active_at)",
    "CREATE INDEX sessions_by_age ON sessions (last_active_at)",
    "CREATE INDEX sessions_by_frame ON sessions (frame)",
    "CREATE INDEX sessions_by_lineage ON sessions (tenant, lineage)",
    "CREATE INDEX sessions_by_successor ON sessions (tenant, successor) WHERE successor IS NOT NULL",
    "CREATE INDEX sessions_by_transcript ON sessions (transcript)",
    'CREATE INDEX sessions_by_window ON sessions (tenant, "window") WHERE "window" IS NOT NULL',
    "CREATE INDEX sessions_by_window_transcript ON sessions (window_transcript)",
    "CREATE INDEX sessions_unfrozen ON sessions (last_active_at, tenant, id) WHERE state = 'active'",
    "CREATE UNIQUE INDEX successions_by_successor ON successions (tenant, successor)",
    "CREATE INDEX turns_by_session ON turns (tenant, session_id, id)",
    "CREATE INDEX unindexed_by_content ON unindexed (content)",
    "CREATE INDEX windows_by_creation ON windows (tenant, created_at DESC, name)",
    "CREATE INDEX windows_by_expiry ON windows (expires_at)",
    "CREATE INDEX windows_by_frame ON windows (frame)",
    "CREATE INDEX windows_by_manifest ON windows (manifest)",
    "CREATE INDEX windows_by_parent ON windows (tenant, parent)",
    "CREATE INDEX windows_by_pin_salt ON windows (pin_salt)",
    "CREATE INDEX windows_by_salt ON windows (salt)",
    "CREATE INDEX windows_by_session ON windows (tenant, session_id, created_at)",
    "CREATE INDEX windows_by_size ON windows (tenant, size_bytes DESC, name)",
    "CREATE INDEX windows_by_tokens ON windows (tenant, token_count DESC, name)",
    "CREATE INDEX windows_by_transcript ON windows (transcript)",
)
_TRIGGERS = (
    """CREATE FUNCTION windows_begin_with_text() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NOT EXISTS (SELECT 1 FROM links WHERE id = NEW.transcript)
            OR (NEW.frame IS NOT NULL AND NOT EXISTS (SELECT 1 FROM contents WHERE id = NEW.frame)) THEN
            RAISE EXCEPTION 'a window was to be added without its text';
        END IF;
        RETURN NEW;
    END $$""",
    """CREATE TRIGGER windows_begin_with_text BEFORE INSERT ON windows
    FOR EACH ROW EXECUTE FUNCTION windows_begin_with_text()""",
    """CREATE FUNCTION windows_keep_their_text() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF EXISTS (SELECT 1 FROM windows WHERE transcript = OLD.id) THEN
            RAISE EXCEPTION 'the text of a window was to be deleted';
        END IF;
        RETURN OLD;
    END $$""",
    """CREATE TRIGGER windows_keep_their_text BEFORE DELETE ON links
    FOR EACH ROW EXECUTE FUNCTION windows_keep_their_text()""",
    """CREATE FUNCTION response_items_go_with_their_answer() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        DELETE FROM response_items WHERE number = OLD.number;
        RETURN NULL;
    END $$""",
    """CREATE TRIGGER response_items_go_with_their_answer AFTER DELETE ON responses
    FOR EACH ROW EXECUTE FUNCTION response_items_go_with_their_answer()""",
    """CREATE FUNCTION contents_are_indexed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO unindexed (content) SELECT id FROM added;
        RETURN NULL;
    END $$""",
    """CREATE TRIGGER contents_are_indexed AFTER INSERT ON contents REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION contents_are_indexed()""",
)
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (*_TABLES, *_INDEXES, *_TRIGGERS),
    (*schema.MIGRATIONS[BASE], "CREATE INDEX turns_unbooked ON turns (id) WHERE unbooked"),
    # After a crash of the server no lease holds any more, and so no row of a turn either: they need no log.
    tuple(
        step.replace("CREATE TABLE open_turns", "CREATE UNLOGGED TABLE open_turns") for step in schema.MIGRATIONS[22]
    ),
)
"""The steps to the schemas `BASE`, `BASE` + 1 and so on."""
COMPATIBLE: frozenset[int] = frozenset()
"""Schemas that a gateway which knows only the one before can work with: their steps only add what it need not fill."""


async def migrate(
    connection: "asyncpg.Connection[asyncpg.Record]", steps: Sequence[Sequence[str]] = MIGRATIONS, *,
    compatible: Collection[int] = COMPATIBLE,
) -> str:  # fmt: skip
    """Bring the schema up to date, in one transaction; return the store's id.

    Several gateways may do so at once: one of them migrates. Raises StartError when the server is too old, or a newer
    gateway has taken a step that is not among its `compatible` ones.
    """
    if (server := int(await connection.fetchval("SHOW server_version_num"))) < _SERVER:
        raise StartError(f"the store's server is PostgreSQL {server // 10_000}: 15 or newer is needed")
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _MIGRATING)
        version = await _version(connection)
        newest = BASE + len(steps) - 1
        if version > newest and await _needed(connection, version) > newest:
            raise StartError(f"the store has schema {version}, this gateway knows {newest}: use a newer gateway")
        for step in steps[max(0, version - BASE + 1) :]:
            for statement in step:
                await connection.execute(translated_schema(statement))
        if version < newest:
            await connection.execute(
                """INSERT INTO meta VALUES ('schema', $1)
                ON CONFLICT (name) DO UPDATE SET value = excluded.value""",
                str(newest),
            )
            await _set_needed(connection, max(n for n in range(BASE, newest + 1) if n not in compatible), newest)
        return str(await connection.fetchval("SELECT value FROM meta WHERE name = 'store_id'"))


async def _needed(connection: "asyncpg.Connection[asyncpg.Record]", version: int) -> int:
    """The schema that a gateway has to know to work with this database."""
    return int(await connection.fetchval("SELECT value FROM meta WHERE name = 'schema_needed'") or version)


async def _set_needed(connection: "asyncpg.Connection[asyncpg.Record]", needed: int, version: int) -> None:
    await connection.execute("DELETE FROM meta WHERE name = 'schema_needed'")
    if needed < version:
        await connection.execute("INSERT INTO meta VALUES ('schema_needed', $1)", str(needed))


async def _version(connection: "asyncpg.Connection[asyncpg.Record]") -> int:
    """The schema of the database, 0 if it has none."""
    if await connection.fetchval("SELECT to_regclass('meta')") is None:
        return 0
    return int(await connection.fetchval("SELECT value FROM meta WHERE name = 'schema'") or 0)
