"""One request of a conversation at a time finds its session."""

import asyncio

import pytest

from gateway.sessions.turn_gate import TurnGate

pytestmark = pytest.mark.anyio


async def test_the_next_one_enters_when_the_first_has_left() -> None:
    gate = TurnGate()
    leave = await gate.enter("a")
    waiting = asyncio.create_task(gate.enter("a"))
    other = await gate.enter("b")
    await asyncio.sleep(0)
    assert not waiting.done()
    leave()
    leave()  # lets nobody else in
    second = await waiting
    third = asyncio.create_task(gate.enter("a"))
    await asyncio.sleep(0)
    assert not third.done()
    second()
    (await third)()
    other()
    assert not gate._locks


async def test_who_is_cancelled_while_waiting_leaves_nothing() -> None:
    gate = TurnGate()
    leave = await gate.enter("a")
    waiting = [asyncio.create_task(gate.enter("a")) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    waiting[2].cancel()
    await asyncio.sleep(0)
    leave()
    (await waiting[1])()
    assert not gate._locks
