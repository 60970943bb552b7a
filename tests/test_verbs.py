"""What one does with a window that is there: each parameter checked, each error named, at the admin API and the CLI."""

import json
from typing import Any

import pytest

from tests.running import Gateway
from tests.test_admin import error_of, freeze
from tests.test_cli import assert_failed, cwg


@pytest.fixture
def window(gateway: Gateway, session: str) -> str:
    """A window of two messages, without KV."""
    freeze(gateway, session, f"w-{session}", description="first", tags=["a", "b"], ttl_seconds=60)
    return f"w-{session}"


def assert_refused(response: Any, code: str, *says: str) -> None:
    """It was refused in the admin API's shape, and the words are there."""
    status, got = error_of(response)
    assert (status, got) == (400, code), response.text
    for words in says:
        assert words in response.text


# --- PATCH


def test_a_patch_changes_what_it_names_and_nothing_else(gateway: Gateway, window: str) -> None:
    before = gateway.http.get(f"/admin/windows/{window}").json()
    answer = gateway.http.patch(f"/admin/windows/{window}", json={"tags": ["c"]})
    assert answer.status_code == 200
    changed = gateway.http.get(f"/admin/windows/{window}").json()
    assert changed == {**before, "tags": ["c"]}
    assert [w["name"] for w in gateway.http.get(f"/admin/windows?tags=c&search={window}").json()["windows"]] == [window]
    assert gateway.http.get(f"/admin/windows?tags=a&search={window}").json()["total"] == 0


def test_null_clears_and_a_new_ttl_counts_from_now(gateway: Gateway, window: str) -> None:
    cleared = gateway.http.patch(
        f"/admin/windows/{window}", json={"description": None, "tags": None, "ttl_seconds": None}
    ).json()
    assert (cleared["description"], cleared["tags"], cleared["expires_at"]) == ("", [], None)
    again = gateway.http.patch(f"/admin/windows/{window}", json={"ttl_seconds": 3600}).json()
    assert again["expires_at"] > again["created_at"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "nothing to change"),
        ({"description": "x" * 2001}, "description"),
        ({"tags": "a"}, "tags"),
        ({"tags": ["bad tag!"]}, "tags"),
        ({"ttl_seconds": 0}, "ttl_seconds"),
        ({"ttl_seconds": True}, "ttl_seconds"),
    ],
)
def test_a_patch_that_is_wrong_names_the_field(gateway: Gateway, window: str, body: dict[str, Any], says: str) -> None:
    assert_refused(gateway.http.patch(f"/admin/windows/{window}", json=body), "invalid_request", says)


def test_a_patch_cannot_change_what_a_window_holds(gateway: Gateway, window: str) -> None:
    for field in ("token_count", "name", "desription"):
        assert_refused(gateway.http.patch(f"/admin/windows/{window}", json={field: "x"}), "unknown_parameter", field)
    missing = gateway.http.patch("/admin/windows/nobody", json={"description": "d"})
    assert error_of(missing) == (404, "window_not_found")


def test_the_cli_describes(gateway: Gateway, window: str) -> None:
    done = cwg("describe", window, "--description", "new", "--tag", "x", "--no-ttl", "--json", url=gateway.url)
    answer = json.loads(done.stdout)
    assert (answer["description"], answer["tags"], answer["expires_at"]) == ("new", ["x"], None)
    assert cwg("describe", window, "--tag", "x", "--no-tags", url=gateway.url).returncode == 2
    assert_failed(cwg("describe", window, url=gateway.url), "nothing to change")


# --- verify


def test_a_window_without_kv_has_nothing_that_could_be_damaged(gateway: Gateway, window: str) -> None:
    verdict = gateway.http.post(f"/admin/windows/{window}/verify").json()
    assert (verdict["ok"], verdict["kv"], verdict["tiers"], verdict["damaged"]) == (True, "absent", {}, [])
    assert "0 of 0 chunks" in verdict["warnings"][0]
    done = cwg("verify", window, url=gateway.url)
    assert (done.returncode, "chunks usable" in done.stdout) == (0, True)


def test_a_verification_takes_no_parameters_and_needs_a_window(gateway: Gateway, window: str) -> None:
    answer = gateway.http.post(f"/admin/windows/{window}/verify", json={"deep": True})
    assert_refused(answer, "unknown_parameter", "deep")
    assert error_of(gateway.http.post("/admin/windows/nobody/verify")) == (404, "window_not_found")
    assert_failed(cwg("verify", "nobody", url=gateway.url), "nobody")
