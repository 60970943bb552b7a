"""Records for tests of the store."""

from array import array
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import pytest

from gateway.kv.keys import ObjectKey
from gateway.records import Manifest, PinnedObject, Session, Trace, Turn, Usage, Window
from gateway.sessions import prefix_chain
from gateway.store.store import Store
from gateway.store.types import Text, TurnRecord

Open = Callable[[], AbstractAsyncContextManager[Store]]
only_sqlite = pytest.mark.parametrize("open_store", ["sqlite"], indirect=True)
"""A test of the store that opens its file, or is about it."""


TENANT = "default"


def says(*texts: str) -> list[dict[str, Any]]:
    """A conversation."""
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(texts)]


def finished(
    session: str, messages: list[dict[str, Any]] | None, *, at: float = 100.0, tenant: str = TENANT, **more: Any
) -> TurnRecord:
    """A turn that is over."""
    usage = None if messages is None else Usage(10 * len(messages), 1, 2)
    turn = Turn(tenant, session, "demo", "completed" if messages else "client_gone", 200, at, 500.0, usage)
    trace = prefix_chain.trace(b"", messages[:-1], messages[-1]) if messages else Trace(b"", b"", None)
    began = Session(tenant, session, session)
    return TurnRecord(turn, began, "fp", f"salt-{session}", messages, more.pop("frame", {}), trace, **more)


def window(name: str, transcript: bytes = b"", **more: Any) -> Window:
    """A window without KV."""
    plain = Window(
        tenant=TENANT, name=name, session_id="s", lineage="s", salt="salt", pin_salt="salt", model="demo",
        model_root="org/demo", fingerprint="fp",
        world_size=1, token_count=10, chunk_size=4, chunk_count=2, size_bytes=100, kv="complete",
        transcript=transcript, frame=None, manifest=f"m-{name}", created_at=1000.0, receipt={"tokens": 10},
    )  # fmt: skip
    return replace(plain, **more)


def manifest(name: str, held: Iterable[ObjectKey] = (), tiers: tuple[str, ...] = ("disk",)) -> Manifest:
    """What a window is made of."""
    objects = tuple(
        PinnedObject(str(one), tier, 50, f"{tier}{one.chunk_hash}".encode()) for one in held for tier in tiers
    )
    return Manifest(f"m-{name}", array("I", (1, 2, 2**32 - 1)), objects)


async def add(
    store: Store, name: str, held: Iterable[ObjectKey] = (), text: Text | None = None, session: Session | None = None,
    **more: Any,
) -> Window:  # fmt: skip
    """Commit a window."""
    made = window(name, **more)
    committed = await store.add_window(
        made, replace(manifest(name, held), id=made.manifest), text or Text(says("said", "so")), session=session
    )
    assert committed is not None
    return committed


async def messages_of(store: Store, session: str) -> list[dict[str, Any]]:
    """The transcript of a session."""
    found = await store.session(TENANT, session)
    assert found is not None
    assert found.transcript is not None
    return await store.messages(found.transcript)


ODD: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "日本語 🎉 \u0000 \\ \" ' %"}], "name": ""},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"arguments": '{"a": 1e400}'}}]},
    {"role": "tool", "content": "", "tool_call_id": "1", "deep": {"a": [{"b": [[]]}]}},
    {"role": "user", "content": "x" * 1_000_000, "numbers": [0.1, -0.0, 2**53, 2**64 - 1, 1e308]},
]  # fmt: skip


async def count(store: Store, table: str) -> int:
    """How many rows a table has."""
    rows: int = await store.run_read(lambda db: db.value(f"SELECT count(*) FROM {table}"))
    return rows
