"""The schema of the SQLite store, as numbered migrations. A migration that has landed is never changed.

Transcripts are Merkle lists: a link is named by the hash of the link before it and of its message, so sessions, forks
and windows that share a beginning share its rows, and a transcript is named by its last link.
"""

import sqlite3

from gateway.errors import StartError

# The first schema.
_M001 = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "INSERT INTO meta VALUES ('store_id', lower(hex(randomblob(6))))",
    "CREATE TABLE contents (id BLOB PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID",
    """CREATE TABLE links (
        id BLOB PRIMARY KEY, parent BLOB, content BLOB NOT NULL REFERENCES contents (id), depth INTEGER NOT NULL
    ) WITHOUT ROWID""",
    """CREATE TABLE sessions (
        tenant TEXT NOT NULL, id TEXT NOT NULL, lineage TEXT NOT NULL, model TEXT NOT NULL, fingerprint TEXT NOT NULL,
        salt TEXT NOT NULL, state TEXT NOT NULL, token_count INTEGER NOT NULL, turn_count INTEGER NOT NULL,
        transcript BLOB, frame BLOB,
        window TEXT, window_transcript BLOB, created_at REAL NOT NULL, last_active_at REAL NOT NULL, frozen_at REAL,
        PRIMARY KEY (tenant, id)
    ) WITHOUT ROWID""",
    "CREATE INDEX sessions_by_activity ON sessions (tenant, last_active_at)",
    "CREATE INDEX sessions_by_lineage ON sessions (tenant, lineage)",
    """CREATE TABLE turns (
        id INTEGER PRIMARY KEY, tenant TEXT NOT NULL, session_id TEXT NOT NULL, model TEXT NOT NULL, outcome TEXT NOT
        NULL, status INTEGER NOT NULL, started_at REAL NOT NULL, duration_ms REAL NOT NULL,
        prompt_tokens INTEGER, completion_tokens INTEGER, cached_tokens INTEGER, detail TEXT NOT NULL
    )""",
    "CREATE INDEX turns_by_session ON turns (tenant, session_id, id)",
    "CREATE TABLE manifests (id TEXT PRIMARY KEY, token_ids BLOB NOT NULL) WITHOUT ROWID",
    """CREATE TABLE objects (
        key TEXT NOT NULL, tier TEXT NOT NULL, size INTEGER NOT NULL, checksum BLOB NOT NULL, PRIMARY KEY (key, tier)
    ) WITHOUT ROWID""",
    """CREATE TABLE manifest_objects (
        manifest TEXT NOT NULL REFERENCES manifests (id), position INTEGER NOT NULL,
        key TEXT NOT NULL, tier TEXT NOT NULL,
        PRIMARY KEY (manifest, position, tier)
    ) WITHOUT ROWID""",
    "CREATE INDEX manifest_objects_by_key ON manifest_objects (key)",
    """CREATE TABLE windows (
        tenant TEXT NOT NULL, name TEXT NOT NULL, session_id TEXT NOT NULL, lineage TEXT NOT NULL, salt TEXT NOT NULL,
        model TEXT NOT NULL, model_root TEXT NOT NULL, fingerprint TEXT NOT NULL, world_size INTEGER NOT NULL,
        token_count INTEGER NOT NULL, chunk_size INTEGER NOT NULL, chunk_count INTEGER NOT NULL, size_bytes INTEGER
        NOT NULL,
        kv TEXT NOT NULL, transcript BLOB NOT NULL, frame BLOB, manifest TEXT NOT NULL REFERENCES manifests (id),
        created_at REAL NOT NULL, description TEXT NOT NULL, tags TEXT NOT NULL, parent TEXT, expires_at REAL,
        receipt TEXT NOT NULL,
        PRIMARY KEY (tenant, name)
    )""",
    "CREATE INDEX windows_by_creation ON windows (tenant, created_at)",
    "CREATE INDEX windows_by_manifest ON windows (manifest)",
    "CREATE INDEX windows_by_parent ON windows (tenant, parent)",
    """CREATE TABLE window_tags (
        tenant TEXT NOT NULL, tag TEXT NOT NULL, name TEXT NOT NULL, PRIMARY KEY (tenant, tag, name),
        FOREIGN KEY (tenant, name) REFERENCES windows (tenant, name) ON DELETE CASCADE
    ) WITHOUT ROWID""",
)

# How sessions are recognised, and what is needed to delete a transcript link by link.
_M002 = (
    "ALTER TABLE sessions ADD COLUMN source TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE sessions ADD COLUMN parent TEXT",
    "ALTER TABLE sessions ADD COLUMN head BLOB",
    "ALTER TABLE sessions ADD COLUMN asked BLOB",
    "ALTER TABLE sessions ADD COLUMN tip BLOB",
    "ALTER TABLE sessions ADD COLUMN answered INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE sessions ADD COLUMN prompt_tokens INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE sessions ADD COLUMN engine TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE sessions ADD COLUMN normalised TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE turns ADD COLUMN source TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE turns ADD COLUMN engine TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE turns ADD COLUMN estimated_tokens INTEGER",
    "ALTER TABLE turns ADD COLUMN expected_tokens INTEGER",
    "ALTER TABLE turns ADD COLUMN miss TEXT NOT NULL DEFAULT ''",
    # Each point of a conversation at which a turn asked or was answered, by its link in the prefix chain.
    """CREATE TABLE beginnings (
        tenant TEXT NOT NULL, link BLOB NOT NULL, session_id TEXT NOT NULL, PRIMARY KEY (tenant, link, session_id)
    ) WITHOUT ROWID""",
    "CREATE INDEX beginnings_by_session ON beginnings (tenant, session_id)",
    "CREATE INDEX sessions_by_age ON sessions (last_active_at)",
    "CREATE INDEX links_by_parent ON links (parent)",
    "CREATE INDEX links_by_content ON links (content)",
    "CREATE INDEX sessions_by_transcript ON sessions (transcript)",
    "CREATE INDEX sessions_by_window_transcript ON sessions (window_transcript)",
    "CREATE INDEX sessions_by_frame ON sessions (frame)",
    "CREATE INDEX windows_by_transcript ON windows (transcript)",
    "CREATE INDEX windows_by_frame ON windows (frame)",
)

# Stored responses. What a response repeats of its request (`echo`) is shared with other responses.
_M003 = (
    """CREATE TABLE responses (
        number INTEGER PRIMARY KEY, tenant TEXT NOT NULL, id TEXT NOT NULL, session_id TEXT NOT NULL,
        lineage TEXT NOT NULL, created_at REAL NOT NULL, answer BLOB NOT NULL, echo BLOB NOT NULL,
        instructed INTEGER NOT NULL, transcript BLOB, asked BLOB,
        UNIQUE (tenant, id)
    )""",
    "CREATE INDEX responses_by_age ON responses (tenant, number)",
    "CREATE INDEX responses_by_session ON responses (tenant, session_id)",
    "CREATE INDEX responses_by_transcript ON responses (transcript)",
    "CREATE INDEX responses_by_asked ON responses (asked)",
    "CREATE INDEX responses_by_echo ON responses (echo)",
)

# Aliases of the last reply of each session.
_M004 = (
    """CREATE TABLE ends (
        tenant TEXT NOT NULL, link BLOB NOT NULL, session_id TEXT NOT NULL, PRIMARY KEY (tenant, link, session_id)
    ) WITHOUT ROWID""",
    "CREATE INDEX ends_by_session ON ends (tenant, session_id)",
)

# The salts that a session's turns ran under, and the orphaned ones, so that their KV can be deleted.
_M005 = (
    """CREATE TABLE session_salts (
        salt TEXT NOT NULL, tenant TEXT NOT NULL, session_id TEXT NOT NULL, PRIMARY KEY (salt, tenant, session_id)
    ) WITHOUT ROWID""",
    "CREATE INDEX session_salts_by_session ON session_salts (tenant, session_id)",
    "INSERT INTO session_salts SELECT salt, tenant, id FROM sessions WHERE salt != ''",
    """CREATE TABLE loose_salts (
        salt TEXT PRIMARY KEY, tenant TEXT NOT NULL, lineage TEXT NOT NULL, since REAL NOT NULL
    ) WITHOUT ROWID""",
    "CREATE INDEX windows_by_salt ON windows (salt)",
    "CREATE INDEX windows_by_expiry ON windows (expires_at)",
)

# Who is freezing which session automatically, and which windows were made that way.
_M006 = (
    """CREATE TABLE auto_freezes (
        tenant TEXT NOT NULL, session_id TEXT NOT NULL, claimed_until REAL NOT NULL DEFAULT 0,
        not_before REAL NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0,
        covered_tokens INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (tenant, session_id),
        FOREIGN KEY (tenant, session_id) REFERENCES sessions (tenant, id) ON DELETE CASCADE
    ) WITHOUT ROWID""",
    """CREATE TABLE auto_windows (
        number INTEGER PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, session_id TEXT NOT NULL,
        UNIQUE (tenant, name),
        FOREIGN KEY (tenant, name) REFERENCES windows (tenant, name) ON DELETE CASCADE
    )""",
    "CREATE INDEX auto_windows_by_session ON auto_windows (tenant, session_id)",
    "CREATE INDEX sessions_unfrozen ON sessions (last_active_at, tenant, id) WHERE state = 'active'",
)

# The salt of a window's pins: an isolated clone uses its source's, so that no object has to be renamed.
_M007 = (
    "ALTER TABLE windows ADD COLUMN pin_salt TEXT NOT NULL DEFAULT ''",
    "UPDATE windows SET pin_salt = salt",
    "CREATE INDEX windows_by_pin_salt ON windows (pin_salt)",
    "CREATE INDEX windows_by_session ON windows (tenant, session_id, created_at)",
)

# The session that continues a conversation whose context was full.
_M008 = (
    "ALTER TABLE sessions ADD COLUMN successor TEXT",
    """CREATE TABLE successions (
        tenant TEXT NOT NULL, session_id TEXT NOT NULL, successor TEXT NOT NULL, window TEXT NOT NULL,
        dropped INTEGER NOT NULL, link BLOB NOT NULL, PRIMARY KEY (tenant, session_id)
    ) WITHOUT ROWID""",
    "CREATE UNIQUE INDEX successions_by_successor ON successions (tenant, successor)",
    "CREATE INDEX sessions_by_successor ON sessions (tenant, successor) WHERE successor IS NOT NULL",
)

# Indexes that give a page of the list of windows in the most common orders without sorting.
_M009 = (
    "DROP INDEX windows_by_creation",
    "CREATE INDEX windows_by_creation ON windows (tenant, created_at DESC, name)",
    "CREATE INDEX windows_by_tokens ON windows (tenant, token_count DESC, name)",
    "CREATE INDEX windows_by_size ON windows (tenant, size_bytes DESC, name)",
)

# Manifests refer to objects by number: a key is long, and a large window has thousands to look up.
_M010 = (
    "ALTER TABLE objects RENAME TO keyed_objects",
    "ALTER TABLE manifest_objects RENAME TO keyed_manifest_objects",
    """CREATE TABLE objects (
        number INTEGER PRIMARY KEY, key TEXT NOT NULL, tier TEXT NOT NULL, size INTEGER NOT NULL,
        checksum BLOB NOT NULL, UNIQUE (key, tier)
    )""",
    """CREATE TABLE manifest_objects (
        manifest TEXT NOT NULL REFERENCES manifests (id), position INTEGER NOT NULL,
        object INTEGER NOT NULL REFERENCES objects (number),
        PRIMARY KEY (manifest, position, object)
    ) WITHOUT ROWID""",
    "INSERT INTO objects (key, tier, size, checksum) SELECT key, tier, size, checksum FROM keyed_objects",
    """INSERT INTO manifest_objects SELECT manifest, position, number
    FROM keyed_manifest_objects JOIN objects USING (key, tier)""",
    "DROP TABLE keyed_manifest_objects",
    "DROP TABLE keyed_objects",
    "CREATE INDEX manifest_objects_by_object ON manifest_objects (object)",
)

# Messages and token ids in rowid tables. In a table without rowids SQLite reads the whole of each row that it passes:
# the megabyte of token ids of a large window, for each of its thousand objects.
_M011 = (
    "CREATE TABLE numbered_contents (id BLOB NOT NULL UNIQUE, body BLOB NOT NULL)",
    "INSERT INTO numbered_contents SELECT id, body FROM contents",
    "DROP TABLE contents",
    "ALTER TABLE numbered_contents RENAME TO contents",
    "CREATE TABLE numbered_manifests (id TEXT NOT NULL UNIQUE, token_ids BLOB NOT NULL)",
    "INSERT INTO numbered_manifests SELECT id, token_ids FROM manifests",
    "DROP TABLE manifests",
    "ALTER TABLE numbered_manifests RENAME TO manifests",
)

# Aliases of every reply, not only of the last; `tip` is that reply, `marks` what the alias leaves out. Older aliases
# left out something else and are dropped: such a conversation is matched by its prefix until its next turn.
_M012 = (
    "DROP TABLE ends",
    """CREATE TABLE ends (
        tenant TEXT NOT NULL, link BLOB NOT NULL, session_id TEXT NOT NULL, tip BLOB NOT NULL, marks BLOB NOT NULL,
        PRIMARY KEY (tenant, link, session_id)
    ) WITHOUT ROWID""",
    "CREATE INDEX ends_by_session ON ends (tenant, session_id)",
)

# No window is added without its text, and none loses it, whatever the code does.
_M013 = (
    """CREATE TRIGGER windows_begin_with_text BEFORE INSERT ON windows
    WHEN NOT EXISTS (SELECT 1 FROM links WHERE id = NEW.transcript)
        OR (NEW.frame IS NOT NULL AND NOT EXISTS (SELECT 1 FROM contents WHERE id = NEW.frame))
    BEGIN SELECT RAISE(ABORT, 'a window was to be added without its text'); END""",
    """CREATE TRIGGER windows_keep_their_text BEFORE DELETE ON links
    WHEN EXISTS (SELECT 1 FROM windows WHERE transcript = OLD.id)
    BEGIN SELECT RAISE(ABORT, 'the text of a window was to be deleted'); END""",
)

# One row for each reply's aliases, found by the beginning of its key (`gateway.records.Alias`). The older ones are
# hashes of all of that and are dropped: such a conversation is matched by its prefix until its next turn.
_M014 = (
    "DROP TABLE ends",
    """CREATE TABLE ends (
        tenant TEXT NOT NULL, link BLOB NOT NULL, history BLOB NOT NULL, question BLOB NOT NULL,
        session_id TEXT NOT NULL, tip BLOB NOT NULL, marks BLOB NOT NULL,
        PRIMARY KEY (tenant, link, history, question, session_id)
    ) WITHOUT ROWID""",
    "CREATE INDEX ends_by_session ON ends (tenant, session_id)",
)

# Which stored response an item is part of: clients refer to earlier output by item id.
_M015 = (
    """CREATE TABLE response_items (
        tenant TEXT NOT NULL, id TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (tenant, id)
    ) WITHOUT ROWID""",
    "CREATE INDEX response_items_by_number ON response_items (number)",
    """INSERT OR IGNORE INTO response_items
    SELECT tenant, json_extract(item.value, '$.id'), number
    FROM responses, json_each(CAST(answer AS TEXT), '$.output') AS item
    WHERE item.type = 'object' AND json_type(item.value, '$.id') = 'text'""",
    """CREATE TRIGGER response_items_go_with_their_answer AFTER DELETE ON responses
    BEGIN DELETE FROM response_items WHERE number = OLD.number; END""",
)

# The names that the code has for them.
_M016 = (
    "ALTER TABLE sessions RENAME COLUMN head TO first_message_hash",
    "ALTER TABLE sessions RENAME COLUMN asked TO last_request_hash",
    "ALTER TABLE sessions RENAME COLUMN tip TO last_reply_hash",
    "ALTER TABLE responses RENAME COLUMN asked TO request_input",
    "ALTER TABLE beginnings RENAME TO session_prefixes",
    "ALTER TABLE ends RENAME COLUMN tip TO reply_hash",
    "ALTER TABLE ends RENAME TO reply_aliases",
    "ALTER TABLE loose_salts RENAME TO orphaned_salts",
)

# Titles. Those of what is there already are filled in later (`gateway.store.title_rows`): it may be a lot.
_M017 = (
    "ALTER TABLE sessions ADD COLUMN title TEXT",
    "ALTER TABLE windows ADD COLUMN title TEXT",
    """INSERT INTO meta VALUES ('untitled', '["sessions", "", ""]')""",
)

# What the engine did not have to compute, and how long that would have taken. `savings` adds up, for all of a tenant, a
# session and a window (`kind`, `name`), and for each curve and source. Where a curve could not tell yet, `unpriced_*`
# have what it needs to tell later.
_M018 = (
    "ALTER TABLE turns ADD COLUMN first_token_ms REAL",
    """CREATE TABLE prefill_curves (
        id INTEGER PRIMARY KEY, engine TEXT NOT NULL, fingerprint TEXT NOT NULL, model TEXT NOT NULL,
        began_at REAL NOT NULL, samples INTEGER NOT NULL DEFAULT 0, reach INTEGER NOT NULL DEFAULT 0,
        per_request REAL, per_token REAL, per_pair REAL, error_share REAL
    )""",
    "CREATE INDEX prefill_curves_by_engine ON prefill_curves (engine, fingerprint, id)",
    """CREATE TABLE prefill_samples (
        number INTEGER PRIMARY KEY, curve INTEGER NOT NULL REFERENCES prefill_curves (id),
        size_class INTEGER NOT NULL, computed INTEGER NOT NULL, cached INTEGER NOT NULL, seconds REAL NOT NULL,
        predicted REAL
    )""",
    "CREATE INDEX prefill_samples_by_curve ON prefill_samples (curve, size_class, number)",
    """CREATE TABLE savings (
        tenant TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, curve INTEGER NOT NULL, source TEXT NOT NULL,
        requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, tokens INTEGER NOT NULL, seconds REAL NOT NULL,
        unpriced_tokens INTEGER NOT NULL, unpriced_squares INTEGER NOT NULL, unpriced_longest INTEGER NOT NULL,
        since REAL NOT NULL, PRIMARY KEY (tenant, kind, name, curve, source)
    ) WITHOUT ROWID""",
    "CREATE INDEX savings_unpriced ON savings (curve) WHERE unpriced_tokens > 0",
    """CREATE TABLE held_kv (
        id INTEGER PRIMARY KEY, bytes INTEGER NOT NULL, byte_hours REAL NOT NULL, since REAL NOT NULL, at REAL NOT NULL
    )""",
)

# Requests are booked once, for their session or for the rest: all of them are added up when somebody asks.
_M019 = ("DELETE FROM savings WHERE kind = 'all'",)

# The messages that are in the index of words (`gateway.store.search_index`). Those that are here are indexed later.
_M020 = ("CREATE TABLE searchable (number INTEGER PRIMARY KEY AUTOINCREMENT, content BLOB NOT NULL UNIQUE)",)

# How often a session was taken back to a window, as a turn that began before is not part of it; and what a thaw has
# booked for it, as its next turn finds the same tokens again.
_M021 = (
    "ALTER TABLE sessions ADD COLUMN rewinds INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE sessions ADD COLUMN booked_tokens INTEGER NOT NULL DEFAULT 0",
)

# The turns that the ledger is yet to book (`gateway.store.ledger_rows`), and for which model.
_M022 = (
    "ALTER TABLE turns ADD COLUMN fingerprint TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE turns ADD COLUMN unbooked BOOLEAN NOT NULL DEFAULT FALSE",
)

# The gateways that share the store, what only one of them may do at a time, the KV objects that they are pinning or
# removing (`keys`, one a line), and their turns in flight.
_M023 = (
    """CREATE TABLE gateways (
        id TEXT PRIMARY KEY, started REAL NOT NULL, until REAL NOT NULL, looked_at REAL NOT NULL,
        protocol INTEGER NOT NULL, oldest INTEGER NOT NULL, host TEXT NOT NULL, process TEXT NOT NULL
    )""",
    "CREATE TABLE leases (name TEXT PRIMARY KEY, gateway TEXT NOT NULL, until REAL NOT NULL)",
    """CREATE TABLE pin_claims (
        id TEXT NOT NULL, salt TEXT NOT NULL, gateway TEXT NOT NULL, kind TEXT NOT NULL, keys TEXT NOT NULL,
        PRIMARY KEY (id, salt)
    )""",
    """CREATE TABLE open_turns (
        gateway TEXT NOT NULL, turn_key BLOB NOT NULL, is_over INTEGER NOT NULL, PRIMARY KEY (turn_key, gateway)
    )""",
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    _M001, _M002, _M003, _M004, _M005, _M006, _M007, _M008, _M009, _M010, _M011, _M012, _M013, _M014, _M015, _M016,
    _M017, _M018, _M019, _M020, _M021, _M022, _M023,
)  # fmt: skip


def migrate(db: sqlite3.Connection) -> None:
    """Bring the schema up to date, each step in a transaction of its own; foreign keys are enforced from then on.

    Raises StartError when the database was written by a newer gateway.
    """
    # While they are, no table can be replaced that others refer to (sqlite.org/lang_altertable.html, section 7).
    db.execute("PRAGMA foreign_keys = OFF")
    while _step(db):
        pass
    db.execute("PRAGMA foreign_keys = ON")


def _step(db: sqlite3.Connection) -> bool:
    """Run the next migration, if there is one; return whether there was."""
    db.execute("BEGIN IMMEDIATE")  # before the version is read: another worker may be migrating
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        db.execute("ROLLBACK")
        raise StartError(f"the store has schema {version}, this gateway knows {len(MIGRATIONS)}: use a newer gateway")
    if version < len(MIGRATIONS):
        for statement in MIGRATIONS[version]:
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {version + 1}")
    db.execute("COMMIT")
    return version < len(MIGRATIONS)
