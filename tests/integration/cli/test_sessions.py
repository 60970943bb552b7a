"""`cwg status` of sessions, and `cwg session delete`."""

import json
import re

from tests.support.cli import assert_failed, cwg, cwg_on_terminal
from tests.support.gateway_process import Gateway


def test_status_of_a_session(gateway: Gateway, session: str) -> None:
    gateway.chat(session, "one")
    gateway.freeze(session, f"w-{session}")
    gateway.chat(session, "two")
    ended = cwg("status", session, url=gateway.url)
    assert ended.returncode == 0, ended.stderr
    told, _, turns = ended.stdout.partition("\n\n")
    lines = dict(re.split(" {2,}", line, maxsplit=1) for line in told.splitlines())
    assert (lines["session"], lines["state"], lines["frozen into"]) == (session, "active", f"w-{session}")
    assert re.fullmatch(r"\d+ of \d+,?\d* tokens \(.*%\)", lines["context"])
    assert lines["continue at"] == f"{gateway.url}/s/{session}/v1"
    head, *rows = turns.splitlines()
    assert re.split(" {2,}", head)[:4] == ["turn", "took", "prompt", "cached"]
    assert sum("completed" in row for row in rows) == 2
    answer = json.loads(cwg("status", session, "--json", url=gateway.url).stdout)
    misses = [turn["miss"] for turn in answer["turns"] if turn["miss"] != "none"]
    assert all(f"  {miss}" in rows for miss in misses)
    assert misses


def test_status_prefers_the_window(gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    gateway.freeze(session, session)
    assert cwg("status", session, url=gateway.url).stdout.startswith("window ")
    assert cwg("status", session, "--window", url=gateway.url).stdout.startswith("window ")
    assert cwg("status", session, "--session", url=gateway.url).stdout.startswith("session ")


def test_status_of_an_id_that_no_window_can_have(gateway: Gateway, session: str) -> None:
    gateway.chat(f"{session}:main")
    assert cwg("status", f"{session}:main", url=gateway.url).stdout.startswith("session ")
    assert_failed(cwg("status", f"{session}:main", "--window", url=gateway.url), "NAME", "not a valid window name")


def test_status_of_nothing_suggests_what_there_is(gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    assert_failed(cwg("status", f"{session}x", url=gateway.url), "no window and no session", f"mean '{session}'?")
    assert_failed(cwg("status", "like-nothing", url=gateway.url), "`cwg list` and `cwg sessions` list what there is")
    assert_failed(cwg("status", session, "--window", url=gateway.url), f"no window '{session}'")
    assert_failed(cwg("status", session, "--blocks", url=gateway.url), f"no window '{session}'")
    assert cwg("status", session, "--blocks", "--session", url=gateway.url).returncode == 2


def test_status_of_a_window_shows_expiry_and_lineage(gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    gateway.freeze(session, session, ttl_seconds=3 * 3600)
    gateway.http.post(f"/admin/windows/{session}/clone", json={"target_window": f"c-{session}"})
    lines = cwg("status", session, url=gateway.url).stdout
    assert re.search(r"(?m)^expires +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, in 2 h$", lines)
    assert re.search(rf"(?m)^children +c-{session}$", lines)
    clone = cwg("status", f"c-{session}", url=gateway.url).stdout
    assert re.search(rf"(?m)^parent +{session}$", clone)
    assert re.search(r"(?m)^expires +never$", clone)


def test_session_is_deleted_and_its_windows_stay(gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    gateway.freeze(session, session)
    ended = cwg("session", "delete", session, url=gateway.url)
    assert (ended.returncode, ended.stdout.split()) == (0, ["session", session, "freed", "nothing"])
    assert_failed(cwg("session", "delete", session, url=gateway.url), "no session")
    assert cwg("status", session, url=gateway.url).stdout.startswith("window ")


def test_deleting_a_session_on_a_terminal_asks_first(gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    refused = cwg_on_terminal("session", "delete", session, typed="n\n", url=gateway.url)
    assert (refused.returncode, "[y/N]" in refused.stdout) == (1, True)
    assert gateway.http.get(f"/admin/sessions/{session}").status_code == 200
    assert cwg_on_terminal("session", "delete", session, typed="y\n", url=gateway.url).returncode == 0
    assert gateway.http.get(f"/admin/sessions/{session}").status_code == 404
    gateway.chat(session)
    done = cwg_on_terminal("session", "delete", session, "--yes", url=gateway.url)
    assert (done.returncode, "[y/N]" in done.stdout) == (0, False)
    gateway.chat(session)
    gateway.freeze(session, session)
    assert "[y/N]" not in cwg_on_terminal("delete", session, url=gateway.url).stdout  # a window: as ever


def test_deleting_a_window_names_the_session_that_keeps_its_kv(gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    gateway.freeze(session, session)
    gateway.http.post(f"/admin/windows/{session}/thaw", json={"new_session_id": f"t-{session}"})
    ended = cwg("delete", session, url=gateway.url)
    assert f"warning: session 't-{session}' of its lineage is still active or thawed" in ended.stderr
