"""Full-text search in the store."""

import random
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.dialects.search_text import Search
from gateway.records import Session
from gateway.store import search_index, search_rows
from gateway.store.database import finish
from gateway.store.schema import migrate
from gateway.store.sqlite import SqliteStore
from gateway.store.sqlite_db import SqliteDb
from gateway.store.store import Store
from gateway.store.types import Match, Text, WindowQuery
from tests.support.store_records import TENANT, add, count, finished, only_sqlite, says

pytestmark = pytest.mark.anyio

Settle = Callable[[Store], Awaitable[None]]


async def listed(store: Store, text: str, **more: str) -> dict[str, Match]:
    """The windows with a text, and where they have it."""
    found = await store.search_windows(TENANT, WindowQuery(search=text, limit=100, **more))  # type: ignore[arg-type]
    assert found.total == len(found.windows)
    return {window.name: match for (window, _), match in zip(found.windows, found.matches, strict=True)}


async def best(store: Store, text: str, *, every: bool = True, limit: int = 20) -> list[tuple[str, str]]:
    found, _ = await store.search(TENANT, Search(text, every=every), limit)
    return [(one.kind, one.name) for one in found]


async def index(store: Store) -> None:
    while await store._index_some(3):
        pass


@pytest.fixture(params=["indexed", "pending"])
def settle(request: pytest.FixtureRequest) -> Settle:
    """Whether messages are searched in the index, or before they get there: the results are the same."""

    async def nothing(store: Store) -> None:
        return None

    return index if request.param == "indexed" else nothing


async def test_windows_are_found_by_what_was_said(store: Store, settle: Settle) -> None:
    billing = says("How do we bill?", "Billing is by the hour, with Zephyr.", "Good", "Done")
    await add(store, "billing", text=Text(billing))
    await add(store, "other", text=Text(says("Weather?", "Rain.")))
    await settle(store)
    assert await listed(store, "zephyr") == {
        "billing": Match("message", "Billing is by the hour, with Zephyr.", 1, "assistant")
    }
    assert set(await listed(store, "billing hour")) == {"billing"}
    assert set(await listed(store, "bill")) == {"billing"}
    assert set(await listed(store, "illing zephyr")) == set()
    assert set(await listed(store, "rain zephyr")) == set()
    assert await best(store, "zephyr") == [("window", "billing")]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ('"costs"', 0), ("5€", 0), ("cafe", 0), ("CAFÉ", 0), ("cafe\u0301", 0), ("foo_bar", 0), ("baz(qux)", 0),
        ("100%", 0), ("foo_bar.baz", 0), ("100% costs", 0), ("請求", 1), ("東京タワー", 1), ("どこ 東京", 1),
        ("हिन्दी", 2),
        ("STRASSE", 3), ("straße", 3), ("full", 3), ("🚀", 4), ("ราคา", 5), ("เท่าไหร่", 5), ("كِتاب", 6), ("расчёт", 7),
        ("read_file", 8), ("gateway/app.py", 8), ("parts", 9), ("second part", 9),
    ],
)  # fmt: skip
async def test_text_in_any_script_is_found(store: Store, settle: Settle, text: str, number: int) -> None:
    call = {"function": {"name": "read_file", "arguments": '{"path": "gateway/app.py"}'}}
    parts = [{"type": "text", "text": "the parts"}, {"type": "image_url"}, {"type": "text", "text": "second part"}]
    messages = [
        *says("The Café costs 5€; foo_bar.baz(qux) 100%", "請求書はどこですか tokyo東京タワー", "हिन्दी में लिखा"),
        *says("Straße \uff26\uff35\uff2c\uff2c width", "🚀launch it", "ราคาเท่าไหร่ครับ", "كِتاب قديم", "расчёты"),
        {"role": "assistant", "content": None, "tool_calls": [call, 1, {"function": None}]},
        {"role": "user", "content": parts},
    ]
    for at, message in enumerate(messages):
        await add(store, f"w{at}", text=Text([message, {"role": "assistant", "content": "x"}]), manifest=f"m{at}")
    await settle(store)
    found = await listed(store, text)
    assert set(found) == {f"w{number}"}
    assert (found[f"w{number}"].field, found[f"w{number}"].message) == ("message", 0)


@pytest.mark.parametrize(
    "text",
    [
        '"', "''", '"a', "a OR", "NOT a", "NEAR(a b)", "a AND", "(", "a*", "*", "^a", "col:a", "-a", "a + b",
        "\0", "a\0b", "\ud800",
        "{a b}:c", "%", "_", "\\", " ", "", "x" * 10_000, "a " * 5_000, " ".join(map(str, range(2_000))),
        "'; DROP TABLE links",
    ],
)  # fmt: skip
@pytest.mark.parametrize("every", [True, False])
async def test_no_text_is_an_operator_or_an_error(store: Store, settle: Settle, text: str, every: bool) -> None:
    await add(store, "w", text=Text(says("b", "c")))
    await settle(store)
    await listed(store, text)
    await store.search(TENANT, Search(text, every=every), 5)


async def test_names_descriptions_and_tags_are_searched_as_before(store: Store) -> None:
    await add(store, "plan-march", description="The Big 100%_plan", tags=("été", "q1"))
    await add(store, "other")
    for text, field in (
        ("lan-mar", "name"),
        ("PLAN-", "name"),
        ("100%_", "description"),
        ("té", "tag"),
        ("big q1", "description"),
    ):
        assert {name: match.field for name, match in (await listed(store, text)).items()} == {"plan-march": field}, text
    for text in ("100__", '"', ",", "[", "big zebra"):
        assert await listed(store, text) == {}, text


async def test_filters_and_pages_apply_to_what_is_found(store: Store) -> None:
    for number in range(5):
        await add(
            store,
            f"w{number}",
            text=Text(says(f"apple {number}", "a")),
            created_at=float(number),
            tags=("x",) * (number % 2),
        )
    found = await store.search_windows(TENANT, WindowQuery(search="apple", tags=("x",), limit=1))
    assert ([one.name for one, _ in found.windows], found.total, found.truncated) == (["w3"], 2, False)
    found = await store.search_windows(
        TENANT, WindowQuery(search="apple", sort_by="name", descending=False, limit=2, offset=3)
    )
    assert ([one.name for one, _ in found.windows], found.total) == (["w3", "w4"], 5)


async def test_a_message_that_is_shared_is_indexed_once(store: Store) -> None:
    shared = says("the common beginning", "a")
    window = await add(store, "first", text=Text(shared))
    assert await store.copy_window(replace(window, name="clone"), window, None)
    await store.record(
        [
            finished("s", shared),
            finished("s", [*shared, *says("more", "b")]),
            finished("fork", [*shared, *says("else", "c")]),
        ]
    )
    await index(store)
    assert set(await listed(store, "common")) == {"first", "clone"}
    assert set(await best(store, "common")) == {
        ("window", "first"),
        ("window", "clone"),
        ("session", "s"),
        ("session", "fork"),
    }
    assert await best(store, "else") == [("session", "fork")]
    assert await count(store, "searchable") == 6  # of which "a" is one for all


async def test_tenants_see_their_own(store: Store, settle: Settle) -> None:
    await add(store, "mine", text=Text(says("secret", "a")))
    await add(store, "theirs", text=Text(says("secret", "a")), tenant="other", manifest="m2")
    await store.record([finished("s", says("secret", "a"), tenant="other")])
    await settle(store)
    assert set(await listed(store, "secret")) == {"mine"}
    assert await best(store, "secret") == [("window", "mine")]


@only_sqlite
async def test_what_is_deleted_leaves_no_word(store: Store, settle: Settle, tmp_path: Path) -> None:
    await store.record([finished("s", says("zebra", "a", "quagga", "b"))])
    await settle(store)
    await store.delete_session(TENANT, "s")
    await index(store)
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as db:
        db.execute("CREATE VIRTUAL TABLE temp.words USING fts5vocab(main, message_words, row)")
        assert db.execute("SELECT term FROM temp.words").fetchall() == []


async def test_what_is_deleted_is_not_found(store: Store, settle: Settle) -> None:
    await add(store, "w", text=Text(says("zebra", "a")))
    await store.record([finished("s", says("zebra", "a", "quagga", "b"))])
    await settle(store)
    await store.delete_window(TENANT, "w")
    assert await listed(store, "zebra") == {}
    assert await best(store, "zebra") == [("session", "s")]
    await store.delete_session(TENANT, "s")
    assert await best(store, "zebra") == await best(store, "quagga") == []
    await index(store)
    assert await count(store, "searchable") == 0


async def test_retried_turns_are_found_by_their_last_reply(store: Store) -> None:
    for reply in ("zebra", "quagga", "okapi"):
        await store.record([finished("s", says("which?", reply))])
        await index(store)
        assert await best(store, reply) == [("session", "s")]
    assert await best(store, "zebra") == await best(store, "quagga") == []


async def test_the_numbers_of_deleted_messages_are_given_again(store: Store) -> None:
    """SQLite does so with the last row of a table: what has that number then is new to the index."""
    for number in range(30):
        await store.record([finished(f"s{number}", says(f"word{number:02}", f"reply{number:02}"))])
        if number % 2:
            await index(store)
        if number % 3 == 0:
            await store.delete_session(TENANT, f"s{number}")
    for number in range(30):
        expected = [] if number % 3 == 0 else [("session", f"s{number}")]
        assert await best(store, f"word{number:02}") == expected
        assert await best(store, f"reply{number:02}") == expected


@only_sqlite
async def test_index_survives_a_vacuum(store: Store, tmp_path: Path) -> None:
    for number in range(20):
        await store.record([finished(f"s{number}", says(f"word{number:02}", "a"), frame={"n": number})])
    await index(store)
    for number in range(0, 20, 2):
        await store.delete_session(TENANT, f"s{number}")
    await store.record([finished("before", says("before", "b"))])
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as db:
        db.execute("VACUUM")
    await store.record([finished("after", says("after", "b"))])
    for indexed in (False, True):
        assert [await best(store, f"word{number:02}") for number in range(20)] == [
            [("session", f"s{number}")] if number % 2 else [] for number in range(20)
        ]
        assert (await best(store, "before"), await best(store, "after")) == (
            [("session", "before")],
            [("session", "after")],
        )
        if not indexed:
            await index(store)


async def test_random_operations_leave_exactly_what_there_is(store: Store) -> None:
    random.seed(7)
    texts: dict[str, list[str]] = {}
    for step in range(150):
        name = f"s{random.randrange(12)}"
        match random.randrange(4):
            case 0:
                await store.delete_session(TENANT, name)
                texts.pop(name, None)
            case 1:
                await index(store)
            case _:
                kept = texts.get(name, [])[: 2 * random.randrange(3)]
                texts[name] = [*kept, f"w{step:03}", random.choice(("ja", f"r{step:03}"))]
                await store.record([finished(name, says(*texts[name]))])
    words = {f"{kind}{step:03}" for kind in "wr" for step in range(150)}
    for word in sorted(words):
        assert {name for _, name in await best(store, word, limit=100)} == {
            name for name, said in texts.items() if any(one.startswith(word) for one in said)
        }, word


async def test_messages_of_an_older_store_are_indexed(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    async with SqliteStore(path, turns_kept=5) as store:
        await add(store, "w", text=Text(says("zebra", "a")))
        await index(store)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("DROP TABLE message_words")
        db.execute("DELETE FROM searchable")
        db.execute("DELETE FROM meta WHERE name = 'searchable'")
    async with SqliteStore(path, turns_kept=5) as store:
        assert set(await listed(store, "zebra")) == {"w"}
        await index(store)
        assert set(await listed(store, "zebra")) == {"w"}
        assert await store.run_read(lambda db: db.value("SELECT count(*) FROM searchable")) == 2


def test_without_fts5_names_are_searched_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(action: int, _: object, name: object, *__: object) -> int:
        lacks = action == sqlite3.SQLITE_FUNCTION and name == "fts5_source_id"
        return sqlite3.SQLITE_DENY if lacks else sqlite3.SQLITE_OK

    with closing(sqlite3.connect(tmp_path / "x.db", isolation_level=None)) as db:
        db.set_authorizer(refuse)
        migrate(db)
        search_index.prepare(db)
        assert "no FTS5" in caplog.text
        connection = SqliteDb(db)
        assert not finish(search_index.index_some(connection, 10))
        found = finish(search_rows.search_windows(connection, TENANT, WindowQuery(search="w")))
        assert (found.windows, found.total, found.truncated) == ([], 0, False)
        assert finish(search_rows.search(connection, TENANT, Search("w"), 5)) == ([], False)


@pytest.mark.parametrize("indexed", [True, False])
async def test_a_question_finds_what_answers_it(store: Store, indexed: bool) -> None:
    for number, topic in enumerate(
        ("the weather in Oslo", "what we eat", "how the garden grows", "which of the trains")
    ):
        said = says(f"Let us talk about {topic}, and what did we say about it?", "We decided nothing about it, did we?")
        await add(store, f"w{number}", text=Text(said), manifest=f"m{number}")
    await add(store, "right", text=Text(says("About invoices:", "The decision is that Zephyr bills us by the hour.")))
    if indexed:
        await index(store)
    assert (await best(store, "What did we decide about billing?", every=False))[0] == ("window", "right")
    assert (await best(store, "who is Zephyr", every=False))[0] == ("window", "right")
    assert await best(store, "quantum chromodynamics", every=False) == []


async def test_question_without_blanks_finds_what_answers_it(store: Store) -> None:
    await add(store, "right", text=Text(says("請求書は毎月月末に送ります", "はい")))
    await add(store, "wrong", text=Text(says("今日はいい天気です", "はい")))
    await index(store)
    assert (await best(store, "請求書はいつ送りますか", every=False))[0] == ("window", "right")


async def test_a_thawed_session_without_a_turn_has_its_windows_text(store: Store) -> None:
    made = await add(store, "w", text=Text(says("zebra", "a")))
    thawed = Session(TENANT, "t", "s", state="thawed", transcript=made.transcript, last_active_at=1.0)
    await store.add_sessions([thawed], source=made)
    assert await best(store, "zebra") == [("window", "w"), ("session", "t")]


async def test_large_messages_that_are_not_indexed_yet_do_not_hold_a_search_up(store: Store) -> None:
    """A search reads a megabyte of them, the newest, and says so; looking for 64 words in 14 MB took a minute."""
    large = [f"needle{number} " + "lorem ipsum dolor " * 14_000 for number in range(12)]
    await add(store, "old", text=Text(says("thread", *large[:6])))
    await add(store, "new", text=Text(says(*large[6:])))
    found, truncated = await store.search(TENANT, Search("needle11"), 20)
    assert ([one.name for one in found], truncated) == (["new"], True)
    assert await store.search(TENANT, Search("needle0"), 20) == ([], True)
    await index(store)
    found, truncated = await store.search(TENANT, Search("needle0"), 20)
    assert ([one.name for one in found], truncated) == (["old"], False)


async def test_a_word_is_found_before_it_is_indexed_only_where_it_begins(store: Store) -> None:
    await add(store, "w", text=Text(says("Straße, foo-bar and FOO baz")))
    for text, number in (("strasse", 1), ("STRASSE foo_bar", 1), ("foo baz", 1), ("oo-bar", 0), ("bar-foo", 0)):
        found, _ = await store.search(TENANT, Search(text), 20)
        assert len(found) == number, text


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("unit", "word"), [("一", "二"), ("a-", "b")])
async def test_a_long_row_of_the_same_does_not_hold_everything_up(
    store: Store, settle: Settle, unit: str, word: str
) -> None:
    """Of a row of tokens the first 256 are looked for; a regular expression for all of them took two minutes."""
    await add(store, "w", text=Text(says(unit * (250_000 // len(unit)))))
    await settle(store)
    assert await best(store, unit * (9_999 // len(unit)) + word) == [("window", "w")]
    assert await best(store, unit * 100 + word) == []
