"""Workflows of somebody with many windows: tags, names, refusals, and cleaning up."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.stack.clients import cwg, mcp, mcp_refused
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, converse
from tests.stack.tiers import hashes, stored_bytes

pytestmark = pytest.mark.stack


def short(gateway: Gateway, session: str) -> None:
    """A session of less than a chunk: its windows cost next to nothing."""
    chat(gateway.client(session), [{"role": "user", "content": "Hi"}], max_tokens=2)


def freeze(gateway: Gateway, session: str, name: str, *tags: str) -> dict[str, Any]:
    """A window with tags."""
    return mcp(gateway, "window_freeze", session_id=session, window_name=name, tags=list(tags))


def listed(gateway: Gateway, **filters: Any) -> list[str]:
    """The names that a list has, in its order."""
    return [window["name"] for window in mcp(gateway, "window_list", **filters)["windows"]]


def test_w04_windows_are_found_by_tags_sorted_and_paged_and_a_wrong_word_is_refused(shared: Gateway) -> None:
    short(shared, "organised")
    for number in range(7):
        freeze(shared, "organised", f"note-{number}", "project-x" if number % 2 else "project-y", "debug")
    assert sorted(listed(shared, tags=["project-x"])) == ["note-1", "note-3", "note-5"]
    assert sorted(listed(shared, tags=["project-x", "debug"])) == ["note-1", "note-3", "note-5"]
    assert listed(shared, tags=["project-x", "project-y"]) == []
    page = mcp(shared, "window_list", tags=["debug"], sort_by="created_at", sort_order="desc", limit=5)
    assert [one["name"] for one in page["windows"]] == [f"note-{number}" for number in (6, 5, 4, 3, 2)]
    assert (page["total"], page["has_more"]) == (7, True)
    rest = mcp(shared, "window_list", tags=["debug"], limit=5, offset=5)
    assert ([one["name"] for one in rest["windows"]], rest["has_more"]) == (["note-1", "note-0"], False)
    wrong = mcp_refused(shared, "window_list", sort_by="colour")
    assert (wrong["code"], wrong["details"]["field"]) == ("invalid_request", "sort_by")
    unknown = mcp_refused(shared, "window_list", create_before="2026-01-01")
    assert unknown["code"] == "unknown_parameter"
    assert "created_before" in unknown["hint"]


def test_w09_a_session_that_is_not_there_is_refused_with_a_hint_and_nothing_is_made(shared: Gateway) -> None:
    refused = mcp_refused(shared, "window_freeze", session_id="nobody-made-it", window_name="of-nobody")
    assert (refused["code"], refused["retryable"]) == ("session_not_found", False)
    assert "session_list" in refused["hint"]
    sessions = mcp(shared, "session_list", limit=100)["sessions"]
    assert "nobody-made-it" not in [session["id"] for session in sessions]
    assert mcp_refused(shared, "window_status", session_id="nobody-made-it")["code"] == "session_not_found"
    assert mcp_refused(shared, "window_status", window_name="of-nobody")["code"] == "window_not_found"


def test_w10_a_name_that_is_taken_is_refused_and_free_again_once_its_window_is_deleted(shared: Gateway) -> None:
    short(shared, "twice")
    assert cwg(shared, "freeze", "twice", "taken", "--description", "the first").returncode == 0
    before = mcp(shared, "window_status", window_name="taken")
    again = cwg(shared, "freeze", "twice", "taken", "--description", "the second")
    assert (again.returncode, again.stdout) == (1, "")
    assert "window 'taken' already exists" in again.stderr
    assert mcp_refused(shared, "window_freeze", session_id="twice", window_name="taken")["code"] == (
        "window_already_exists"
    )
    assert mcp(shared, "window_status", window_name="taken") == before
    freeze(shared, "twice", "another-name")
    assert cwg(shared, "delete", "taken").returncode == 0
    assert cwg(shared, "freeze", "twice", "taken", "--description", "the second").returncode == 0
    assert mcp(shared, "window_status", window_name="taken")["description"] == "the second"


def test_w15_the_longest_name_and_the_usual_tags_are_good_in_every_tool(shared: Gateway) -> None:
    converse(shared.client("named-well"), "named well", turns=1)
    name = ("auth-refactor-2026-01-23-" * 6)[:127] + "z"
    copy = name[:-1] + "y"
    tags = ["project-atlas", "debugging", "production", "wip"]
    assert len(name) == 128
    freeze(shared, "named-well", name, *tags)
    mcp(shared, "window_clone", source_window=name, target_window=copy)
    for one in (name, copy):
        assert sorted(mcp(shared, "window_status", window_name=one)["tags"]) == sorted(tags)
        session = mcp(shared, "window_thaw", window_name=one)["session_id"]
        assert session != mcp(shared, "window_thaw", window_name=one)["session_id"], "in the same second"
        assert mcp(shared, "window_status", session_id=session)["window"] == one
    assert sorted(listed(shared, search=name[:100], tags=tags)) == sorted([name, copy])
    assert cwg(shared, "verify", name).returncode == 0
    for one in (name, copy):
        assert mcp(shared, "window_delete", window_name=one)["window_name"] == one
    assert mcp_refused(shared, "window_freeze", session_id="named-well", window_name=name + "!")["code"] == (
        "invalid_window_name"
    )


def test_w16_old_temporary_windows_are_cleaned_up_and_their_bytes_are_free(stack: Stack, shared: Gateway) -> None:
    for session in ("old-work", "new-work"):
        converse(shared.client(session), session, turns=1)
    freeze(shared, "old-work", "old-temporary", "temporary", "january")
    freeze(shared, "old-work", "old-kept", "january")
    new_year = datetime.now(UTC).isoformat()  # a user would say 2026-01-01
    freeze(shared, "new-work", "new-temporary", "temporary", "january")
    assert sorted(listed(shared, tags=["january"], created_before=new_year)) == ["old-kept", "old-temporary"]
    assert listed(shared, tags=["january"], created_after=new_year) == ["new-temporary"]
    refused = mcp_refused(shared, "window_list", created_before="last year")
    assert (refused["code"], refused["details"]["field"]) == ("invalid_request", "created_before")
    mine = hashes(shared, "old-temporary")
    assert mine[0] not in json.dumps(mcp(shared, "window_list", tags=["january"])), "a list stays small"
    mcp(shared, "window_delete", window_name="old-kept")  # shares every chunk, which would have to stay
    assert shared.http.delete("/admin/sessions/old-work").status_code == 200  # so does the session
    held = stored_bytes(stack, mine)
    (name,) = listed(shared, tags=["temporary"], created_before=new_year)
    gone = mcp(shared, "window_delete", window_name=name)
    assert (gone["blocks_deleted"], gone["space_freed_bytes"]) == (len(mine), held)
    assert held > 0
    assert stored_bytes(stack, mine) == 0
    receipt = mcp(shared, "window_thaw", window_name="new-temporary")["receipt"]
    assert receipt["chunks_found"] == receipt["chunks_expected"] > 0


def test_i5_automatic_saves_are_archived_or_deleted(shared: Gateway) -> None:
    converse(shared.client("saved"), "saved", turns=1)
    for number in range(3):
        freeze(shared, "saved", f"save-{number}", "auto-save")
    now = datetime.now(UTC).isoformat()
    saves = listed(shared, tags=["auto-save"], created_before=now, sort_order="asc")
    assert saves == ["save-0", "save-1", "save-2"]
    archived = mcp(shared, "window_clone", source_window="save-2", target_window="archive-2", tags=["archive"])
    for name in saves:
        # All of it is pinned by the archive, so not a byte goes.
        assert mcp(shared, "window_delete", window_name=name, force=True)["space_freed_bytes"] == 0
    assert listed(shared, tags=["auto-save"]) == []
    assert listed(shared, tags=["archive"]) == ["archive-2"]
    receipt = mcp(shared, "window_thaw", window_name="archive-2")["receipt"]
    assert receipt["chunks_found"] == archived["shared_blocks"] > 0
