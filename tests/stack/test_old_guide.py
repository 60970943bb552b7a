"""The scripts of the replaced system's guides that are about KV run as they stand, and do what they are for."""

from collections.abc import Callable, Iterator

import pytest

from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, converse
from tests.support import old_guide
from tests.support.old_guide_scripts import SCRIPTS

pytestmark = pytest.mark.stack

WITH_KV = [name for name, script in SCRIPTS.items() if script.real_kv]


@pytest.fixture(scope="module")
def clean(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with an empty store: the scripts name sessions and windows as they like."""
    root = tmp_path_factory.mktemp("old-guide")
    gateway = Gateway(stack.settings(root / "data"), root / "gateway.log").start()
    yield gateway
    gateway.close()


def run(gateway: Gateway, script: old_guide.Script) -> old_guide.Outcome:
    """Hold the conversations that the script begins with, and run it; what goes on meanwhile is said in its session."""
    held = {}
    for session in {*script.sessions, *(window["session_id"] for window in script.windows.values())}:
        held[session] = converse(gateway.client(session), session, turns=2)

    def meanwhile(line: str) -> None:
        session, colon, text = line.partition(": ")
        if colon:
            chat(gateway.client(session), [*held[session], {"role": "user", "content": text}])

    for name, window in script.windows.items():
        if gateway.get_status(f"/admin/windows/{name}") == 404:
            gateway.freeze(window["session_id"], name, **{key: window[key] for key in window if key != "session_id"})
    return old_guide.run(gateway.url, script, meanwhile)


SAYS: dict[str, Callable[[old_guide.Outcome], bool]] = {
    "W0": lambda did: (
        (did.names["frozen"]["storage_tier"], did.names["result"]["partial"], did.names["result"]["warning"])
        == ("disk", False, None)
    ),
    "W1": lambda did: did.names["result"]["cache_hit"] is True and did.names["result"]["cache_efficiency"] > 0.5,
    "W3": lambda did: did.names["result"]["shared_blocks"] > 0,
    "W7": lambda did: did.printed[-1] == "Storage tier: disk",
    "W8": lambda did: bool(did.names["cache_salt"]),
    "W11": lambda did: int(did.printed[0].split()[0]) > 0,
    "W14": lambda did: not did.printed[0].endswith(" 0") and float(did.printed[1].split()[-2]) > 0,
    "I7": lambda did: did.names["result"]["continuation"]["cached_tokens"] > 0,
}


@pytest.mark.parametrize("name", WITH_KV)
def test_a_script_of_the_old_guide_runs_as_it_stands_on_real_kv(clean: Gateway, name: str) -> None:
    did = run(clean, SCRIPTS[name])
    assert SAYS.get(name, lambda _: True)(did), (did.printed, did.names.get("result"))
