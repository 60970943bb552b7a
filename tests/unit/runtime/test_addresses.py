"""Names that are looked up again and again."""

import pytest

from gateway.runtime.addresses import Lookup, LookupFailed, look_up

pytestmark = pytest.mark.anyio


async def test_a_name_has_its_addresses_with_the_port() -> None:
    assert "127.0.0.1:8000" in await look_up("localhost:8000", 5)
    assert await look_up("127.0.0.1:1", 5) == ["127.0.0.1:1"]
    assert await look_up("[::1]:1", 5) == ["[::1]:1"]


async def test_a_name_without_an_address_is_named() -> None:
    with pytest.raises(LookupFailed, match=r"^nobody\.invalid:8000 has no address: "):
        await look_up("nobody.invalid:8000", 5)
    with pytest.raises(LookupFailed, match="has no address"):
        await look_up(f"{'a' * 64}.invalid:1", 5)


async def test_a_look_up_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[list[str] | LookupFailed] = [["a:1", "b:1"], LookupFailed("down"), LookupFailed("down"), ["b:1"]]
    seen: list[list[str]] = []

    async def resolve(_name: str, _timeout_s: float) -> list[str]:
        answer = answers.pop(0)
        if isinstance(answer, LookupFailed):
            raise answer
        return answer

    async def take(addresses: list[str]) -> None:
        seen.append(addresses)

    lookup = Lookup("engines:1", 5, take, resolve)
    troubles = []
    with caplog.at_level("INFO"):
        while answers:
            await lookup.once()
            troubles.append(lookup.trouble)
    assert seen == [["a:1", "b:1"], ["b:1"]]
    assert troubles == ["", "down", "down", ""]
    assert [r.message for r in caplog.records] == [
        "down; the addresses known before stay",
        "engines:1 has addresses again",
    ]
