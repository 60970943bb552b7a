"""The fields of the replaced system beside ours, and what an empty value means to a clone."""

from typing import Any

import pytest
from mcp import Client

from tests.support.gateway_process import Gateway
from tests.support.mcp_answers import answer

pytestmark = pytest.mark.anyio

each_transport = pytest.mark.parametrize("client", ["http", "stdio-legacy"], indirect=True)


@each_transport
async def test_the_fields_of_the_replaced_system_are_beside_ours(
    client: Client, gateway: Gateway, session: str
) -> None:
    gateway.chat(session)
    name, copy = f"w-{session}", f"c-{session}"
    frozen = await answer(client, "window_freeze", session_id=session, window_name=name, prompt_prefix="unused")
    assert (frozen["window_name"], frozen["storage_tier"]) == (name, None)
    assert frozen["total_size_bytes"] == frozen["size_bytes"]
    assert frozen["message"].startswith(f"session {session} is saved as window {name}: ")
    thawed = await answer(client, "window_thaw", window_name=name)
    receipt = thawed["receipt"]
    assert thawed["cache_efficiency"] == round(receipt["cached_tokens"] / receipt["prompt_tokens"], 2)
    assert (thawed["blocks_found"], thawed["blocks_expected"]) == (receipt["chunks_found"], receipt["chunks_expected"])
    assert (thawed["partial"], thawed["restoration_time_ms"]) == (receipt["partial"], receipt["duration_ms"])
    assert (thawed["warning"] or "") == "; ".join(thawed["warnings"])
    assert f"X-Session-ID: {thawed['session_id']}" in thawed["instructions"]
    await answer(client, "window_clone", source_window=name, target_window=copy)
    cloned = await answer(client, "window_clone", source_window=copy, new_window_name=f"c-{copy}")
    assert (cloned["new_window_name"], cloned["lineage"]) == (f"c-{copy}", [name, copy])
    pages = await answer(client, "window_list", session_id=session, limit=2, offset=2)
    assert [pages[key] for key in ("count", "page", "total_pages", "has_next", "has_prev")] == [1, 2, 2, False, True]
    assert [one["total_size_bytes"] for one in pages["windows"]] == [0]
    status = await answer(client, "window_status", window_name=copy, include_lineage=True)
    assert (status["id"], status["window"]["name"], status["window"]["parent_window"]) == (copy, copy, name)
    wanted = {"is_clone": True, "depth": 1, "root_window": name, "parent_window": name}
    assert wanted.items() <= status["lineage"].items()
    assert status["timestamps"]["frozen_at"] == status["created_at"]
    of_session = await answer(client, "window_status", session_id=session, window_name="")
    assert (of_session["session"]["id"], of_session["window_count"]) == (session, 3)
    assert of_session["timestamps"]["updated_at"] == of_session["last_active_at"]
    sessions = await answer(client, "session_list", limit=1)
    assert (sessions["count"], sessions["page"], sessions["has_prev"]) == (1, 1, False)
    gone = await answer(client, "window_delete", window_name=name)
    assert (gone["blocks_deleted"], gone["message"]) == (0, f"window {name} is deleted")


@each_transport
async def test_what_a_clone_is_given_empty_is_empty(client: Client, gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    gateway.freeze(session, f"w-{session}", description="old", tags=["old"])

    async def clone(**said: Any) -> tuple[str, list[str]]:
        given = {"source_window": f"w-{session}", "target_window": f"c-{session}"}
        made = await answer(client, "window_clone", **given, **said)
        await answer(client, "window_delete", window_name=f"c-{session}")
        return made["description"], made["tags"]

    assert await clone() == await clone(description=None, tags=None) == ("old", ["old"])
    assert await clone(description="", tags=[]) == ("", [])
