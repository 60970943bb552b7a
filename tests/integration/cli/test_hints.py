"""Errors as a user of `cwg` gets them: in the words of its options and commands."""

from pathlib import Path

import pytest

from tests.support.cli import Ended, assert_failed, cwg
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import Gateway, gateway_in_front_of


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["freeze", "a b", "w"], "SESSION 'a b' is not a valid session id"),
        (["freeze", "s", "a/b"], "NAME 'a/b' is not a valid window name"),
        (["freeze", "s", "w", "--tag", "a b"], "--tag must be tags of 1 to 64"),
        (["freeze", "s", "w", "--ttl", "-1"], "--ttl must be a number of seconds"),
        (["clone", "w", "a/b"], "TARGET 'a/b' is not"),
        (["thaw", "a b"], "NAME 'a b' is not"),
        (["thaw", "a/b"], "names have no slash"),
        (["thaw", "w", "--session", "a b"], "--session 'a b' is not"),
        (["list", "--limit", "0"], "--limit must be a whole number from 1 to 100"),
        (["list", "--created-after", "soon"], "--created-after must be"),
        (["search", " "], "QUERY must be a non-blank string"),
        (["ask", "w", " "], "QUESTION must be a non-blank string"),
        (["fanout", "w", "0"], "COUNT must be a whole number"),
        (["session", "delete", "a b"], "SESSION 'a b' is not"),
        (["thaw", "no-such-window"], "`cwg list` lists them"),
        (["freeze", "no-such-session", "w"], "`cwg sessions` lists them"),
    ],
)
def test_error_names_the_option_and_the_command(gateway: Gateway, command: list[str], says: str) -> None:
    assert_failed(cwg(*command, url=gateway.url), says)


def test_options_of_a_thaw_that_do_not_go_together_are_named() -> None:
    both = cwg("thaw", "w", "--into", "s", "--session", "t")
    assert (both.returncode, "--session makes a new session, --into takes" in both.stderr) == (2, True)
    alone = cwg("thaw", "w", "--keep-as", "k")
    assert (alone.returncode, "the session of --into" in alone.stderr) == (2, True)


def test_taken_names_say_which_option_gives_another(gateway: Gateway, session: str, tmp_path: Path) -> None:
    gateway.chat(session)
    gateway.freeze(session, session)
    file = tmp_path / "w.cwg"
    assert cwg("export", session, str(file), url=gateway.url).returncode == 0
    assert_failed(cwg("import", str(file), url=gateway.url), "under another name with --name")
    assert_failed(cwg("freeze", session, session, url=gateway.url), "choose another name", "`cwg delete`")
    assert_failed(cwg("thaw", session, "--session", session, url=gateway.url), "choose another --session")
    assert_failed(cwg("describe", session, url=gateway.url), "--description, --tag or --ttl", "--no-ttl")


@pytest.mark.parametrize("content", [b"some-host\n", b"\x7fELF" + bytes(4000), b"x" * 512])
def test_import_of_another_file_says_that_it_is_none(gateway: Gateway, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "hostname"
    file.write_bytes(content)
    assert_failed(cwg("import", str(file), url=gateway.url), "this is not a window file")


@pytest.mark.parametrize("kept", [1, 100, 500])
def test_import_of_a_beginning_of_a_window_file_says_that_it_is_cut(
    gateway: Gateway, session: str, tmp_path: Path, kept: int
) -> None:
    gateway.chat(session)
    gateway.freeze(session, session)
    file = tmp_path / "w.cwg"
    assert cwg("export", session, str(file), url=gateway.url).returncode == 0
    file.write_bytes(file.read_bytes()[:kept])
    assert_failed(cwg("import", str(file), url=gateway.url), "truncated")


def test_missing_key_says_which_variable(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, api_key="secret") as own:
        assert_failed(cwg("list", url=own.url), "set CWG_API_KEY")
        assert cwg("list", url=own.url, api_key="secret").returncode == 0


def with_url(url: str) -> Ended:
    """List windows at this address."""
    return cwg("list", url=url)


def test_address_without_a_scheme_or_of_a_client_says_what_to_give(gateway: Gateway) -> None:
    assert_failed(with_url(gateway.url.removeprefix("http://")), f"did you mean {gateway.url}?")
    for path in ("/v1", "/v1/", "/s/alice/v1", "/w/kickoff/v1"):
        assert_failed(with_url(gateway.url + path), f"the gateway itself: {gateway.url})")
    assert with_url(f"{gateway.url}/").returncode == 0


def test_url_option_overrides_the_environment(gateway: Gateway) -> None:
    nowhere = "http://127.0.0.1:9"
    assert cwg("--url", gateway.url, "sessions", url=nowhere).returncode == 0
    assert cwg("sessions", "--url", gateway.url, url=nowhere).returncode == 0
    assert_failed(cwg("--url", nowhere, "sessions", url=gateway.url), nowhere)
