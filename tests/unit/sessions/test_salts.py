"""Salts: keyed, one way, in the alphabet that vLLM and LMCache take; and the secret behind them."""

import hmac
import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway.errors import StartError
from gateway.sessions.salts import is_exposed, read_secret, salt

SECRET = b"0123456789abcdef0123456789abcdef"


def test_a_salt_is_the_hmac_that_it_says_it_is() -> None:
    fields = b"cwg1\0\0\0\1t\0\0\0\1l\0\0\0\2fp\0\0\0\0"
    assert salt(SECRET, "t", "l", "fp") == hmac.digest(SECRET, fields, "sha256").hex()[:32]
    # What is written here is in every tier of every installation: it may never change.
    assert salt(SECRET, "default", "alice", "f" * 32) == "1885bf1659012af32e166d76786b6fac"


def test_every_field_and_the_secret_separate() -> None:
    base = ("t", "l", "f", "c")
    others = [(*base[:n], "x", *base[n + 1 :]) for n in range(4)]
    made = [salt(SECRET, *fields) for fields in (base, *others)] + [salt(SECRET[::-1], *base)]
    assert len(set(made)) == 6


def test_fields_do_not_run_into_each_other() -> None:
    parts = ["", "a", "b", "ab", "aab", "\0", "a\0", "\0\0\0\1a"]
    made = {salt(SECRET, *fields) for fields in itertools.product(parts, repeat=4)}
    assert len(made) == len(parts) ** 4


@pytest.mark.parametrize("odd", ["", "日本語 🎉", "@/\\\0", "a" * 100_000, "\n"])
def test_a_salt_has_only_characters_that_every_tier_takes(odd: str) -> None:
    made = salt(SECRET, odd, odd, odd, odd)
    assert len(made) == 32
    assert set(made) <= set("0123456789abcdef")


def test_a_secret_is_made_on_first_use_for_its_owner_only_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "secret"
    made = read_secret(path)
    assert len(made) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert read_secret(path) == made
    assert [p.name for p in path.parent.iterdir()] == ["secret"]
    assert read_secret(tmp_path / "other") != made


def test_white_space_around_a_secret_is_not_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"\n " + SECRET + b"\r\n")
    assert read_secret(tmp_path / "secret") == SECRET


def test_gateways_that_start_at_once_agree_on_the_secret(tmp_path: Path) -> None:
    for attempt in range(20):
        path, start = tmp_path / f"{attempt}" / "secret", threading.Barrier(8)

        def read(_: int, path: Path = path, start: threading.Barrier = start) -> bytes:
            start.wait(5)
            return read_secret(path)

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(read, range(8)))) == 1
        assert [p.name for p in path.parent.iterdir()] == ["secret"]


@pytest.mark.parametrize("content", [b"", b"short", b" " * 40, SECRET[:31]])
def test_a_secret_that_is_too_short_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(StartError, match=r"secret holds \d+ characters; a secret has at least 32"):
        read_secret(tmp_path / "secret")
    assert (tmp_path / "secret").read_bytes() == content


def test_an_unreadable_secret_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "secret"):
        with pytest.raises(StartError, match="cannot be read or made") as refused:
            read_secret(path)
        assert os.fspath(path) in str(refused.value)


@pytest.mark.parametrize(
    ("mode", "is_ours", "exposed"),
    [
        (0o600, True, False), (0o640, True, True), (0o604, True, True),
        (0o440, False, False), (0o444, False, True), (0o460, False, True),
    ],
)  # fmt: skip
def test_a_secret_of_another_user_may_be_read_by_our_group_alone(mode: int, is_ours: bool, exposed: bool) -> None:
    owner = os.geteuid() if is_ours else os.geteuid() + 1
    assert is_exposed(os.stat_result((0o100000 | mode, 0, 0, 1, owner, 0, 64, 0, 0, 0))) == exposed
