"""What `cwg` prints on a terminal of 80 columns, and what people can read of it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len

from gateway.cli import main
from tests.support.cli import assert_failed, cwg, cwg_on_terminal
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import Gateway, gateway_in_front_of

LONG = "s-" + "0123456789abcdef" * 7
WIDE = "расчёт 漢字 " * 12


@pytest.fixture
def long_name(gateway: Gateway, session: str) -> Iterator[str]:
    """A session and a window whose name does not fit on a line."""
    name = f"{LONG}-{session[2:]}"
    gateway.chat(name)
    gateway.freeze(name, name, description=WIDE, tags=["расчёт", "漢字"], ttl_seconds=7200)
    yield name
    gateway.http.delete(f"/admin/windows/{name}")
    gateway.http.delete(f"/admin/sessions/{name}")


def test_names_are_never_cut_or_broken(gateway: Gateway, long_name: str) -> None:
    for command in (
        ["list", "--session", long_name],
        ["sessions"],
        ["tree"],
        ["status", long_name, "--blocks"],
        ["status", long_name, "--session"],
    ):
        ended = cwg_on_terminal(*command, url=gateway.url)
        assert ended.returncode == 0, ended
        assert re.search(rf"(?m)(^|\W){long_name}\b", ended.stdout), command
        assert not re.search(r"(?m)…(?!$)", ended.stdout)  # titles, at the end of a line, are


def test_row_that_is_too_wide_is_shown_in_several_lines(gateway: Gateway, long_name: str) -> None:
    shown = cwg_on_terminal("list", "--session", long_name, url=gateway.url).stdout.splitlines()
    assert shown[0] == long_name
    assert [line[:2] for line in shown[1:]] == ["  "] * (len(shown) - 1)
    assert shown[1] == f"  session {long_name}"
    told = r"  tokens \d+ · kv absent · created (just now|\d+ s ago) · expires in 1 h · tags расчёт, 漢字"
    assert re.fullmatch(told, shown[2])


def test_list_has_no_raw_numbers(gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    gateway.freeze(session, session, ttl_seconds=4 * 3600)
    head, row, _ = cwg_on_terminal("list", "--session", session, url=gateway.url).stdout.splitlines()
    assert head.split() == ["name", "session", "tokens", "kv", "created", "expires"]
    assert re.search(r" (just now|\d+ s ago)  in 3 h$", row)


def test_lists_show_titles_that_fit_on_a_line(engine: FakeEngine, tmp_path: Path) -> None:
    evil, wide = "\x1b[2J \u202e<b>What</b>\nis this?", "расчёт 漢字 " * 12
    with gateway_in_front_of(engine.url, tmp_path) as own:
        for session, said in (("s1", evil), ("s2", wide)):
            own.chat(session, said)
            own.freeze(session, f"w-{session}")
        for command in ("list", "sessions"):
            shown = cwg_on_terminal(command, url=own.url).stdout
            assert "\n  [2J <b>What</b> is this?\n" in shown, command
            (cut,) = re.findall(r"(?m)^  (расчёт 漢字 .*)…$", shown)
            assert 74 <= cell_len(cut) <= 77
            assert any(
                line.endswith("  [2J <b>What</b> is this?") for line in cwg(command, url=own.url).stdout.splitlines()
            )
        drawn = cwg_on_terminal("tree", url=own.url).stdout
        assert drawn.count("<b>What</b> is this?") == 1  # the window has its session's
        assert max(map(cell_len, drawn.splitlines())) <= 80


def test_lists_that_are_empty_say_so(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as own:
        for command, noun in (("list", "no windows"), ("sessions", "no sessions"), ("tree", "no windows")):
            ended = cwg(command, url=own.url)
            assert (ended.returncode, ended.stdout.strip()) == (0, "")
            assert ended.stderr.startswith(noun)
        own.chat("s")
        assert cwg("sessions", "--offset", "1", url=own.url).stderr == "--offset skips all of 1 session\n"


def test_sessions_say_what_they_came_from_and_became(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as own:
        own.chat("root")
        own.freeze("root", "first")
        own.freeze("root", "second")
        own.http.post("/admin/windows/first/thaw", json={"new_session_id": "branch"})
        head, *rows = (re.split(" {2,}", line) for line in cwg("sessions", url=own.url).stdout.splitlines())
    assert head == ["session", "state", "tokens", "turns", "last active", "thawed from", "frozen into", "title"]
    assert {row[0]: row[-3:-1] for row in rows} == {"branch": ["first", "-"], "root": ["-", "second"]}


def test_filters_of_list(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as own:
        for session in ("one", "two"):
            own.chat(session)
        own.freeze("one", "b", tags=["auto"])
        own.freeze("one", "a", tags=["mine"])
        own.freeze("two", "c")

        def names(*filters: str) -> list[str]:
            ended = cwg("list", *filters, url=own.url)
            assert ended.returncode == 0, ended.stderr
            return [line.split()[0] for line in ended.stdout.splitlines()[1:]]

        assert names() == ["c", "a", "b"]
        assert names("--no-auto") == ["c", "a"]
        assert names("--session", "one") == ["a", "b"]
        assert names("--session", "one", "--no-auto", "--tag", "mine") == ["a"]
        assert names("--model", "another") == []
        assert names("--created-before", "2020-01-01") == []
        assert names("--created-after", "2020-01-01", "--sort", "name", "--order", "asc") == ["a", "b", "c"]
        assert cwg("list", "--no-auto", "--limit", "1", url=own.url).stderr == "1 of 2; --offset 1 shows more\n"
        assert_failed(cwg("list", "--created-before", "yesterday", url=own.url), "--created-before must be")
    for wrong in (["--sort", "colour"], ["--order", "down"]):
        assert cwg("list", *wrong).returncode == 2


def test_help_cuts_no_description_and_names_the_environment() -> None:
    shown = cwg_on_terminal("--help").stdout
    assert "..." not in shown.partition("Commands:")[2]
    for name in ("CWG_URL", "CWG_API_KEY", "--url"):
        assert name in shown
    for command in main.commands:
        assert cwg(command, "--help").returncode == 0


def test_freeze_without_a_name_makes_one(gateway: Gateway, session: str) -> None:
    gateway.chat(f"{session}:main")
    ended = cwg("freeze", f"{session}:main", url=gateway.url)
    assert ended.returncode == 0, ended.stderr
    name = ended.stdout.splitlines()[0].split()[1]
    assert re.fullmatch(rf"{session}-main-\d{{8}}-\d{{6}}", name)
    assert cwg("status", name, url=gateway.url).returncode == 0
    longest = "x" * 128
    gateway.chat(longest)
    assert cwg("freeze", longest, url=gateway.url).returncode == 0
    assert_failed(cwg("freeze", "a b", url=gateway.url), "SESSION 'a b' is not a valid session id")


def test_thaw_ends_with_the_address_to_continue_at(gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    gateway.freeze(session, session)
    ended = cwg("thaw", session, "--session", f"t-{session}", url=f"{gateway.url}/")
    assert ended.stdout.splitlines()[-1].split() == ["continue", "at", f"{gateway.url}/s/t-{session}/v1"]


def test_policy_shows_what_set_takes(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as own:

        def rules(*options: str) -> dict[str, str]:
            ended = cwg("policy", *options, url=own.url)
            assert ended.returncode == 0, ended.stderr
            return dict(re.split(" {2,}", line, maxsplit=1) for line in ended.stdout.splitlines())

        assert rules()["set at run time"] == "none: all are from the settings"
        shown = rules("--set", "enabled=on")
        assert shown["set at run time"] == "enabled"
        assert (shown["enabled"], shown["at_shutdown"], shown["token_threshold"]) == ("on", "off", "off")
        assert (shown["idle_timeout_minutes"], shown["ttl_seconds"]) == ("15", "2592000 (30 days)")
        shown = rules("--set", "at_shutdown=on", "--set", "idle_timeout_minutes=off", "--set", "token_threshold=5")
        assert (shown["at_shutdown"], shown["idle_timeout_minutes"], shown["token_threshold"]) == ("on", "off", "5")
        assert rules("--set", "enabled=off", "--set", "policies=off")["enabled"] == "off"
        answer = own.http.get("/admin/policies").json()
        assert (answer["enabled"], answer["policies"], answer["idle_timeout_minutes"]) == (False, [], None)
        own.chat("alice")
        decision = rules("--check", "alice")
        assert (decision["would freeze"], decision["held back"]) == ("no", "automatic freezing is off")
        assert decision["token_threshold"] == "25 tokens (threshold 5)"
        assert_failed(cwg("policy", "--set", "ttl_seconds=-1", url=own.url), "ttl_seconds must be")


def test_tree_names_a_parent_that_is_not_shown(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as own:
        own.chat("root")
        own.freeze("root", "first")
        own.http.post("/admin/windows/first/thaw", json={"new_session_id": "branch"})
        own.freeze("root", "second")
        ended = cwg("tree", "--limit", "1", url=own.url)
        lines = ended.stdout.splitlines()
        assert "branch  session" in lines[0]
        assert lines[0].endswith(", from window first (not shown)")
        assert lines[1] == "  hi"
        assert lines[2].endswith(", from session root (not shown)")
        assert ended.stderr == "more than 1: 2 windows, 2 sessions; --limit\n"
        nodes = json.loads(cwg("tree", "--json", url=own.url).stdout)["nodes"]
        assert {node["name"] for node in nodes if "missing_parent" in node} == set()


def test_metrics_and_health(gateway: Gateway) -> None:
    ended = cwg("health", url=gateway.url)
    assert (ended.returncode, ended.stdout.splitlines()[0]) == (0, "healthy  engine: serves demo")
    assert "cwg_windows" in cwg("metrics", url=gateway.url).stdout
