"""Which of several conversations under one agent's id has it, whatever order their turns are recorded in."""

from itertools import permutations
from typing import Any

import pytest
from msgspec import structs

from gateway.records import Session, StoredResponse, subconversation_id
from gateway.sessions import prefix_chain
from gateway.store.session_name_rows import TABLES_OF_SESSIONS
from gateway.store.store import Store
from gateway.store.types import TurnRecord
from tests.support.store_records import TENANT, add, finished, only_sqlite, says

pytestmark = pytest.mark.anyio

TITLE, CHAT, OTHER = says("a title, please", "t"), says("plant", "p"), says("dig", "d")


def turn(messages: list[dict[str, Any]], **more: Any) -> TurnRecord:
    """The first turn of a conversation under the id `chat`."""
    head = prefix_chain.head(messages)
    session = Session(TENANT, "chat", "chat", source="header x-chat-id", first_message_hash=head)
    return structs.replace(finished("chat", messages), session=session, **more)


def beside(messages: list[dict[str, Any]]) -> str:
    return subconversation_id("chat", prefix_chain.head(messages))


async def conversation(store: Store, session_id: str) -> list[dict[str, Any]]:
    session = await store.session(TENANT, session_id)
    return list(await store.messages(session.transcript)) if session and session.transcript else []


@pytest.mark.parametrize("order", [*permutations(range(3))], ids=str)
@pytest.mark.parametrize("together", [True, False])
async def test_a_chat_has_its_id_however_its_turns_are_recorded(
    store: Store, order: tuple[int, ...], together: bool
) -> None:
    turns = [turn(TITLE), turn(CHAT, displaces=True), turn(TITLE)]
    for batch in [[turns[n] for n in order]] if together else [[turns[n]] for n in order]:
        await store.record(batch)
    assert (await conversation(store, "chat"), await conversation(store, beside(TITLE))) == (CHAT, TITLE)
    assert len(await store.turns(TENANT, "chat", 9)) == 1
    assert len(await store.turns(TENANT, beside(TITLE), 9)) == 2


async def test_of_two_chats_the_first_recorded_has_the_id(store: Store) -> None:
    with_system = [{"role": "system", "content": "Be terse."}, *CHAT]
    await store.record([turn(TITLE)])
    await store.record([turn(with_system, displaces=True)])
    await store.record([turn(OTHER, displaces=True)])
    found = [await conversation(store, one) for one in ("chat", beside(OTHER), beside(TITLE))]
    assert found == [with_system, OTHER, TITLE]


async def test_whatever_belongs_to_a_session_gets_its_other_id(store: Store) -> None:
    response = StoredResponse(TENANT, "resp_1", "chat", "chat", 1.0, {"id": "resp_1", "output": []})
    await store.record([turn(TITLE, response=response)])
    seen = await store.snapshot(TENANT, "chat")
    assert seen is not None
    assert await store.claim_freeze(seen[0], now=0.0, until=1e9, cool=True)
    await add(store, "w", text=seen[1], session=seen[0], session_id="chat")
    await store.record([turn(CHAT, displaces=True)])
    title = beside(TITLE)
    stored, frozen = await store.response(TENANT, "resp_1"), await store.window(TENANT, "w")
    assert stored is not None
    assert frozen is not None
    assert {stored.session_id, frozen.session_id} == {title}
    assert await store.salts_of(TENANT, title) == ["salt-chat"]
    assert await store.delete_session(TENANT, title)
    assert await conversation(store, "chat") == CHAT


@only_sqlite
async def test_every_table_that_names_a_session_is_known(store: Store) -> None:
    query = """SELECT t.name FROM sqlite_master t JOIN pragma_table_info(t.name) c
        WHERE t.type = 'table' AND t.sql NOT LIKE 'CREATE VIRTUAL%' AND c.name = 'session_id' ORDER BY t.name"""
    assert tuple(name for (name,) in await store.run_read(lambda db: db.all(query))) == TABLES_OF_SESSIONS
