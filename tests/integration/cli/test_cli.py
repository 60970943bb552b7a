"""`cwg` as users run it: what it prints, and with which code it ends."""

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway.cli.output import line, printable
from tests.support.cli import Ended, assert_failed, cwg, cwg_process
from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.gateway_process import ROOT, Gateway, environment, free_port, gateway_in_front_of


@contextmanager
def something_else(answer: bytes) -> Iterator[str]:
    """A server that answers everything with the same bytes: no gateway."""

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                client.recv(65536)
                client.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_the_commands_do_their_work_and_report_it(gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    name = f"w-{session}"
    frozen = cwg_process(
        "freeze", session, name, "--description", "d", "--tag", "a", "--tag", "b", "--ttl", "60", url=gateway.url
    )
    assert (frozen.returncode, frozen.stderr.count("warning: ")) == (0, 1)
    assert name in frozen.stdout
    thawed = cwg_process("thaw", name, "--session", f"t-{session}", url=gateway.url)
    assert (thawed.returncode, f"t-{session}" in thawed.stdout, f"/s/t-{session}/v1" in thawed.stdout) == (
        0,
        True,
        True,
    )
    assert cwg_process("clone", name, f"c-{session}", url=gateway.url).returncode == 0
    assert (
        f"c-{session}"
        in cwg_process("list", "--tag", "a", "--tag", "b", "--search", f"c-{session}", url=gateway.url).stdout
    )
    status = cwg_process("status", name, "--blocks", url=gateway.url)
    assert ("tokens" in status.stdout, status.returncode) == (True, 0)
    assert f"t-{session}" in cwg_process("sessions", "--state", "thawed", url=gateway.url).stdout
    assert cwg_process("health", url=gateway.url).returncode == 0
    assert cwg_process("delete", name, url=gateway.url).returncode == 0
    assert_failed(cwg_process("delete", name, url=gateway.url), name)


def test_every_command_can_answer_in_json(gateway: Gateway, session: str, tmp_path: Path) -> None:
    gateway.chat(session)
    name = f"w-{session}"
    for command in (
        ["freeze", session, name],
        ["thaw", name],
        ["clone", name, f"c-{session}"],
        ["list"],
        ["status", name],
        ["describe", name, "--tag", "a"],
        ["messages", name],
        ["ask", name, "why?"],
        ["fanout", name, "1"],
        ["verify", name],
        ["export", name, str(tmp_path / "w.cwg")],
        ["import", str(tmp_path / "w.cwg"), "--name", f"i-{session}"],
        ["tree"],
        ["sessions"],
        ["cache"],
        ["policy"],
        ["policy", "--check", session],
        ["health"],
        ["metrics"],
        ["doctor"],
        ["delete", name],
        ["session", "delete", session],
    ):
        ended = cwg(*command, "--json", url=gateway.url)
        has_no_cache = command[0] in ("doctor", "verify")
        assert (ended.returncode, ended.stderr) == (int(has_no_cache), ""), command
        assert isinstance(json.loads(ended.stdout), dict)


def test_a_doctor_that_finds_a_leak_ends_with_1(engine: FakeEngine, gateway: Gateway) -> None:
    engine.leaks_salts = True
    ended = cwg("doctor", url=gateway.url)
    engine.leaks_salts = False
    assert (ended.returncode, "NOT isolated" in ended.stdout) == (1, True)
    assert "NOT isolated" not in cwg("doctor", url=gateway.url).stdout


def test_a_doctor_where_windows_could_keep_no_kv_ends_with_1(gateway: Gateway) -> None:
    ended = cwg("doctor", url=gateway.url)
    assert ended.returncode == 1
    assert "failed" in ended.stdout.splitlines()[-1]
    assert "windows cannot keep KV" in ended.stdout.splitlines()[-1]
    checks = [{"name": "disk pins", "status": "ok", "message": "2 objects survived", "remedy": ""}]
    with something_else(answering({"ok": True, "keeps_kv": True, "checks": checks})) as url:
        ended = cwg("doctor", url=url)
    assert (ended.returncode, ended.stdout) == (0, "ok       disk pins: 2 objects survived\n")
    with something_else(answering({"ok": False, "keeps_kv": None, "checks": checks})) as url:
        ended = cwg("doctor", url=url)
    assert (ended.returncode, "could not be tested" in ended.stdout) == (1, True)


@pytest.mark.parametrize(
    "command",
    [
        ["freeze", "none", "w"],
        ["thaw", "none"],
        ["clone", "none", "x"],
        ["status", "none"],
        ["delete", "none"],
        ["freeze", "a b", "w"],
        ["status", "a/b"],
        ["status", ".."],
        ["list", "--limit", "0"],
        ["list", "--tag", "a b"],
    ],
)
def test_a_refusal_of_the_gateway_is_one_line_and_1(gateway: Gateway, command: list[str]) -> None:
    assert_failed(cwg(*command, url=gateway.url))


@pytest.mark.parametrize(
    "command",
    [
        ["nonsense"],
        ["--nonsense"],
        ["freeze"],
        ["thaw", "w", "--warm", "hot"],
        ["list", "--limit", "ten"],
        ["freeze", "s", "w", "--tags", "x"],
        ["delete", "a", "b"],
        ["serve", "--port", "x"],
        ["serve", "--config", "missing.toml"],
        ["sessions", "--state", "deleted"],
    ],
)
def test_wrong_usage_is_2(command: list[str]) -> None:
    ended = cwg(*command)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        (["frezee", "s", "w"], "'freeze'"),
        (["list", "--limt", "3"], "'--limit'"),
        (["sessions", "--state", "frozn"], "'frozen'"),
        (["completion", "bsh"], "'bash'"),
    ],
)
def test_what_is_mistyped_is_answered_with_what_was_meant(command: list[str], meant: str) -> None:
    ended = cwg(*command)
    assert (ended.returncode, "Did you mean" in ended.stderr, meant in ended.stderr) == (2, True, True)


def test_a_mistyped_name_is_answered_with_the_nearest_that_there_is(gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    gateway.freeze(session, f"kickoff-{session}")
    for command in (["status"], ["thaw"], ["delete"], ["ask", "--max-tokens", "5"]):
        more = ["why?"] if command[0] == "ask" else []
        ended = cwg(*command, f"kickof-{session}", *more, url=gateway.url)
        assert_failed(ended, f"did you mean 'kickoff-{session}'?")
    assert_failed(cwg("freeze", f"{session}x", "w", url=gateway.url), f"did you mean '{session}'?")
    ended = cwg("status", "like-nothing-else-here", url=gateway.url)
    assert_failed(ended, "like-nothing-else-here")
    assert "did you mean" not in ended.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_what_the_shell_needs(shell: str) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("click asks bash for its version")
    ended = cwg("completion", shell)
    assert (ended.returncode, "_CWG_COMPLETE" in ended.stdout, ended.stderr) == (0, True, "")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("cwg thaw w-{s}", "w-{s}"),
        ("cwg freeze {s}", "{s}"),
        ("cwg --url {url} status w-{s}", "w-{s}"),
        ("cwg exp", "export"),
    ],
)
def test_commands_and_names_are_completed(gateway: Gateway, session: str, typed: str, offered: str) -> None:
    gateway.chat(session)
    gateway.freeze(session, f"w-{session}")
    words = typed.format(s=session, url=gateway.url)
    asked = {"_CWG_COMPLETE": "fish_complete", "COMP_WORDS": words, "COMP_CWORD": words.rsplit(" ", 1)[1]}
    code = "from gateway.cli import main; main(prog_name='cwg')"
    for url in (gateway.url, f"http://127.0.0.1:{free_port()}"):
        ended = subprocess.run(
            [sys.executable, "-c", code], env={**environment({"CWG_URL": url}), **asked}, cwd=ROOT,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert (ended.returncode, ended.stderr) == (0, "")
        if url == gateway.url:
            assert offered.format(s=session) in ended.stdout


def test_the_rules_are_shown_set_and_reset(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as own:
        pattern = "n-{session_id}-{timestamp}"
        ended = cwg(
            "policy", "--set", "token_threshold=100", "--set", f"naming_pattern={pattern}",
            "--set", "idle_timeout_minutes=null", url=own.url,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        shown = json.loads(cwg("policy", "--json", url=own.url).stdout)
        assert (shown["token_threshold"], shown["idle_timeout_minutes"]) == (100, None)
        assert shown["naming_pattern"] == pattern
        assert_failed(cwg("policy", "--set", "token_treshold=1", url=own.url), "token_threshold")
        assert_failed(cwg("policy", "--set", "keep=many", url=own.url), "keep")
        assert cwg("policy", "--reset", url=own.url).returncode == 0
        assert own.http.get("/admin/policies").json()["set_at_run_time"] == []
        own.chat("alice")
        checked = cwg("policy", "--check", "alice", url=own.url)
        assert (checked.returncode, "would freeze" in checked.stdout) == (0, True)
        assert_failed(cwg("policy", "--check", "alise", url=own.url), "did you mean 'alice'?")
        for wrong in (["--set", "keep"], ["--reset", "--check", "alice"]):
            assert cwg("policy", *wrong, url=own.url).returncode == 2


def test_help_and_version_need_no_gateway() -> None:
    assert "freeze" in cwg_process("--help").stdout
    assert cwg_process("freeze", "-h").returncode == 0
    assert cwg_process("--version").stdout.startswith("cwg, version ")


def test_no_gateway_is_one_line_that_says_what_to_do() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for command in (["list"], ["freeze", "s", "w"], ["doctor"]):
        assert_failed(cwg_process(*command, url=url), url, "cwg serve")


@pytest.mark.parametrize(
    "url", ["nonsense", "ftp://x", "http://", "http://[bad", "http://127.0.0.1:99999", "http://a b", "http://x\n"]
)
def test_an_invalid_url_is_one_line(url: str) -> None:
    assert_failed(cwg("list", url=url))


@pytest.mark.parametrize("key", ["wröng", "a\nb", "wrong"])
def test_an_unusable_key_is_one_line(gateway: Gateway, key: str) -> None:
    ended = cwg("list", url=gateway.url, api_key=key)
    if key == "wrong":  # this gateway asks for none
        assert ended.returncode == 0
    else:
        assert_failed(ended)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\n<html></html>",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b'HTTP/1.1 404 X\r\ncontent-length: 22\r\n\r\n{"detail":"Not Found"}',
        b'HTTP/1.1 500 X\r\ncontent-length: 13\r\n\r\n{"error":"x"}',
        b"HTTP/1.1 502 X\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{}",
        b"SSH-2.0-x\r\n",
        b"",
    ],
)
@pytest.mark.parametrize("command", [["list"], ["freeze", "s", "w"], ["doctor"]])
def test_an_answer_of_something_else_is_one_line(answer: bytes, command: list[str]) -> None:
    with something_else(answer) as url:
        assert_failed(cwg(*command, url=url))


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        (b"prot = 1", "'port'"),
        (b"port = [", "not TOML"),
        (b"port = 'x'", "valid integer, not 'x'"),
        (b"\xff\xfe", ""),
        (b"[section]\nx = 1", "section"),
        (b"host = '0.0.0.0'", "api_key"),
        (b"port = 99999", "65535"),
        (b"port = true", "valid integer, not True"),
    ],
)
def test_an_invalid_settings_file_is_one_line(tmp_path: Path, toml: bytes, says: str) -> None:
    file = tmp_path / "gateway.toml"
    file.write_bytes(toml)
    assert_failed(cwg_process("serve", "--config", str(file)), says)


def test_a_wrong_setting_in_the_environment_is_one_line() -> None:
    assert_failed(cwg_process("serve", engine_url="http://x"), "'engine_urls'")
    says = "option --port: port must be less than or equal to 65535, not 70000"
    assert_failed(cwg_process("serve", "--port", "70000"), says)
    assert_failed(cwg_process("serve", engine_timeout_s="soon"), "CWG_ENGINE_TIMEOUT_S")


# --- what a terminal would obey

EVIL = "a\x1b]52;c;ZXZpbA==\x07b\x1b[2Jc\x9b1md\x00e\x7ff\r\ng\rh\ti[/x][bold]"
SHOWN = "a\\x1b]52;c;ZXZpbA==\\x07b\\x1b[2Jc\\x9b1md\\x00e\\x7ff\ng\\x0dh\ti[/x][bold]"


def answering(value: object) -> bytes:
    """A whole answer of HTTP."""
    body = json.dumps(value).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


def harmless(ended: Ended) -> bool:
    """Whether no character but tabs and ends of lines is one that a terminal obeys."""
    return not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", ended.stdout + ended.stderr)


def test_a_text_is_shown_with_its_control_characters_spelled_out() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("tab\tline\nénd") == "tab\tline\nénd"
    assert line("a\nb\r\nc\x1bd\x85e") == "a b c\\x1bd e"


def test_control_characters_of_a_transcript_never_reach_the_terminal(
    engine: FakeEngine, gateway: Gateway, session: str
) -> None:
    engine.on_chat = lambda exchange: exchange.json(
        {"id": "x", "object": "chat.completion", "model": MODEL, "usage": {"prompt_tokens": 9, "completion_tokens": 1},
         "choices": [{"index": 0, "message": {"role": "assistant", "content": EVIL}, "finish_reason": "stop"}]}
    )  # fmt: skip
    gateway.chat(session, EVIL)
    evil = EVIL.replace("\x00", "")
    gateway.freeze(session, session, description=evil)
    for command in (
        ["messages", session],
        ["status", session],
        ["list"],
        ["sessions"],
        ["tree"],
        ["describe", session, "--ttl", "60"],
        ["ask", session, "what?"],
        ["messages", session, "--json"],
        ["status", session, "--json"],
        ["describe", session, "--description", evil],
        ["delete", f"{session}\x1b[2J"],
        ["freeze", "x\x9b2J", "y"],
        ["thaw", session, "--session", f"t-{session}", "--continue", evil],
    ):
        ended = cwg(*command, url=gateway.url)
        assert harmless(ended), (command, ended)
    assert SHOWN in cwg("messages", session, url=gateway.url).stdout
    assert json.loads(cwg("messages", session, "--json", url=gateway.url).stdout)["messages"][1]["content"] == EVIL


def test_markup_in_a_name_is_a_name() -> None:
    row = {
        "id": "s", "state": "active", "model": "[/x]\x1b[2J[bold]y", "token_count": 1, "turn_count": 1, "window": None,
        "forked_from": None, "last_active_at": "2026-01-01T00:00:00Z", "title": None,
    }  # fmt: skip
    rows = [row, {**row, "model": "another"}]
    page = {"sessions": rows, "nodes": [], "total": 2, "limit": 20, "offset": 0, "has_more": False}
    with something_else(answering(page)) as url:
        ended = cwg("sessions", url=url)
    assert ended.returncode == 0, ended.stderr
    assert "[/x]\\x1b[2J[bold]y" in ended.stdout


def test_control_characters_of_a_health_check_never_reach_the_terminal(engine: FakeEngine) -> None:
    check = {"name": "engine", "status": "failed", "message": "serves [/x]\x1b[2J", "remedy": "[/y]\x9b"}
    with something_else(answering({"ok": False, "keeps_kv": True, "checks": [check]})) as url:
        ended = cwg("doctor", url=url)
    assert (ended.returncode, harmless(ended)) == (1, True)
    assert "failed   engine: serves [/x]\\x1b[2J" in ended.stdout
    assert "[/y]\\x9b" in ended.stdout
