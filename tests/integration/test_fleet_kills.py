"""A gateway is killed at a moment of its work while another one uses the store: no window that exists loses anything.

Each case kills another gateway. What was acknowledged before, by whichever gateway, is compared byte for byte after
each, what the dead one has left is gone, and the one that is alive can do what the other one had begun.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from gateway.kv.keys import ObjectKey
from tests.support.fakes.engine import FakeEngine
from tests.support.fakes.lmcache import FakeLMCache
from tests.support.fleet import LEASE_S, gateway_of
from tests.support.gateway_process import Gateway, eventually
from tests.support.kill_moments import AfterCommit, BeforeFile, InTransaction, Moment, Moments, Victim
from tests.support.postgres import PostgresServer, execute

Files = dict[str, bytes]


@dataclass
class Fleet:
    """A gateway that stays, others that are killed, and what is known to have been frozen."""

    folder: Path
    engines: tuple[FakeEngine, FakeEngine]
    cache: FakeLMCache
    store_url: str
    moments: Moments
    stays: Gateway
    stack: ExitStack
    frozen: dict[str, Files] = field(default_factory=dict)
    _spare: Victim | None = None
    _victims: int = 0

    def settings(self) -> dict[str, object]:
        """Of every gateway: the tier, and short times."""
        tier = {"cache_url": self.cache.url, "kv_dir": self.cache.folder, "freeze_timeout_s": 0.5}
        return {**tier, "sweep_every_s": 0.2, "expiry_grace_s": 0, "engine_check_s": 0.2, "busy_wait_s": 2}

    def victim(self) -> Victim:
        """A gateway to kill. The next one starts meanwhile."""
        victim, self._spare = self._spare or self._start(), self._start()
        victim.gateway.wait("/healthz")
        return victim

    def _start(self) -> Victim:
        self._victims += 1
        engines = ",".join(engine.url for engine in self.engines)
        victim = Victim(self.folder, f"v{self._victims}", engines, self.store_url, **self.settings())
        return self.stack.enter_context(victim)

    def say(self, session: str, text: str) -> None:
        """A turn through the gateway that stays, some chunks long."""
        assert self.stays.chat(session, f"{session} {text} " * 8).status_code == 200

    def freeze(self, session: str, window: str, **more: object) -> None:
        """Freeze through the gateway that stays, and remember the bytes."""
        answer = self.stays.freeze(session, window, **more)
        assert (answer.status_code, answer.json()["kv"]) == (201, "complete"), answer.text
        self.frozen[window] = self.files(window)
        assert self.frozen[window]

    def names(self) -> dict[str, set[str]]:
        """The names of the files that each window holds."""
        rows = self.moments.rows(
            """SELECT w.name, o.key FROM windows w JOIN manifest_objects m ON m.manifest = w.manifest
            JOIN objects o ON o.number = m.object"""
        )
        found: dict[str, set[str]] = {}
        for name, key in rows:
            found.setdefault(name, set()).add(ObjectKey.parse(key).file_name)
        return found

    def files(self, window: str) -> Files:
        """What is pinned for a window."""
        return {name: (self.pins / name).read_bytes() for name in self.names().get(window, ())}

    @property
    def pins(self) -> Path:
        """Where the pins are."""
        (folder,) = (self.folder / "kv-pins").iterdir()
        return folder

    def check(self) -> None:
        """Nothing is left of the dead, and nothing is missing."""
        eventually(self._is_tidy, "what the dead gateway left is gone", LEASE_S + 20, more=self._untidy)
        for window, files in self.frozen.items():
            assert self.files(window) == files, f"{window} has other bytes"

    def _is_tidy(self) -> bool:
        held = set[str]().union(*self.names().values())
        return {path.name for path in self.pins.iterdir()} == held and not self.moments.rows("TABLE pin_claims")

    def _untidy(self) -> str:
        held = set[str]().union(*self.names().values())
        return f"{ {path.name for path in self.pins.iterdir()} ^ held }, {self.moments.rows('TABLE pin_claims')}"


@pytest.fixture(scope="module")
def fleet(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder, url = tmp_path_factory.mktemp("fleet"), postgres_server.new_database()
    with ExitStack() as stack:
        stack.callback(postgres_server.drop, url)
        engines = FakeEngine().start(), FakeEngine().start()
        cache = FakeLMCache(folder / "kv").start()
        for engine in engines:
            stack.callback(engine.stop)
            cache.behind(engine)
        stack.callback(cache.stop)
        fleet = Fleet(folder, engines, cache, url, Moments(url), None, stack)  # type: ignore[arg-type]
        both = ",".join(engine.url for engine in engines)
        fleet.stays = gateway_of(folder, "stays", both, url, **fleet.settings())
        stack.callback(fleet.stays.close)
        fleet.stays.start().wait("/healthz")
        stack.enter_context(fleet.moments)
        yield fleet


def case(kind: str, moment: Moment) -> object:
    """A parameter with a name that can be read."""
    where = f"{moment.call}-{moment.number}" if isinstance(moment, BeforeFile) else moment.place.replace(" ", "-")
    return pytest.param(moment, id=f"{kind}-{where}{'-committed' * isinstance(moment, AfterCommit)}")


def of_name(request: pytest.FixtureRequest) -> str:
    """A name of this case's own."""
    return request.node.callspec.id  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "moment",
    [
        case("freeze", InTransaction("INSERT pin_claims")),
        case("freeze", BeforeFile("os.link", "kv-pins", 3)),
        case("freeze", BeforeFile("os.rename", "kv-pins", 2)),
        case("freeze", InTransaction("INSERT windows")),
        case("freeze", AfterCommit("INSERT windows")),
    ],
)
def test_killed_in_a_freeze(fleet: Fleet, moment: Moment, request: pytest.FixtureRequest) -> None:
    name = of_name(request)
    fleet.say(name, "hello")
    fleet.freeze(name, f"{name}-before")
    fleet.say(name, "more")
    _kill(fleet, moment, lambda gateway: gateway.freeze(name, name))
    again = fleet.stays.freeze(name, name)
    assert again.status_code == (409 if isinstance(moment, AfterCommit) else 201), again.text
    _whole(fleet, name)


@pytest.mark.parametrize(
    "moment",
    [
        case("delete", InTransaction("DELETE windows")),
        case("delete", AfterCommit("DELETE windows")),
        case("delete", BeforeFile("os.remove", "kv-pins")),
        case("delete", BeforeFile("os.remove", "kv-pins", 3)),
        case("delete", InTransaction("DELETE pin_claims")),
    ],
)
def test_killed_in_a_deletion(fleet: Fleet, moment: Moment, request: pytest.FixtureRequest) -> None:
    name = of_name(request)
    fleet.say(name, "hello")
    fleet.freeze(name, f"{name}-before")
    fleet.say(name, "more")
    fleet.freeze(name, name)
    files = fleet.frozen.pop(name)
    _kill(fleet, moment, lambda gateway: gateway.http.delete(f"/admin/windows/{name}"))
    committed = not (isinstance(moment, InTransaction) and moment.place != "DELETE pin_claims")
    if not committed:
        assert fleet.files(name) == files
        _whole(fleet, name)
    deleted = fleet.stays.http.delete(f"/admin/windows/{name}")
    assert deleted.status_code == (404 if committed else 200), deleted.text
    _whole(fleet, f"{name}-before")
    fleet.check()


@pytest.mark.parametrize(
    "moment", [case("forget", InTransaction("DELETE sessions")), case("forget", BeforeFile("os.remove", "kv/", 3))]
)
def test_killed_when_it_deletes_a_session(fleet: Fleet, moment: Moment, request: pytest.FixtureRequest) -> None:
    name = of_name(request)
    fleet.say(name, "hello")
    fleet.freeze(name, f"{name}-before")
    fleet.say(name, "more")
    _kill(fleet, moment, lambda gateway: gateway.http.delete(f"/admin/sessions/{name}"))
    assert fleet.stays.http.delete(f"/admin/sessions/{name}").status_code in (200, 404)
    kept = fleet.names()[f"{name}-before"]
    salt = min(kept).rpartition("@")[2]
    eventually(lambda: {path.name for path in fleet.cache.folder.glob(f"*@{salt}")} <= kept, "a sweep deletes it")
    _whole(fleet, f"{name}-before")


@pytest.mark.parametrize(
    "moment", [case("sweep", InTransaction("DELETE windows")), case("sweep", BeforeFile("os.remove", "kv-pins", 2))]
)
def test_killed_in_a_sweep(fleet: Fleet, moment: Moment, request: pytest.FixtureRequest) -> None:
    name = of_name(request)
    fleet.say(name, "hello")
    fleet.freeze(name, f"{name}-before")
    fleet.say(name, "more")

    def gone(gateway: Gateway, path: str) -> bool:
        return gateway.process.poll() is not None or fleet.stays.http.get(path).status_code == 404

    def let_windows_expire(gateway: Gateway) -> None:
        """By its sweep, or by the last one of the gateway that stays."""
        own = f"SELECT id FROM gateways WHERE process LIKE '% {gateway.process.pid} %'"
        execute(fleet.store_url, f"UPDATE leases SET gateway = ({own}) WHERE name = 'sweep'")
        number = 0
        while gateway.process.poll() is None:
            number += 1
            window = f"{name}-{number}"
            fleet.stays.freeze(name, window, ttl_seconds=0.001)
            path = f"/admin/windows/{window}"
            eventually(partial(gone, gateway, path), "it is deleted")

    _kill(fleet, moment, let_windows_expire)
    eventually(lambda: [one for one in fleet.names() if one.startswith(name)] == [f"{name}-before"], "it sweeps now")
    _whole(fleet, f"{name}-before")
    fleet.check()


@pytest.mark.parametrize(
    "moment", [case("thaw", BeforeFile("os.rename", "kv-pins", 2)), case("thaw", InTransaction("INSERT sessions"))]
)
def test_killed_in_a_thaw(fleet: Fleet, moment: Moment, request: pytest.FixtureRequest) -> None:
    name = of_name(request)
    fleet.say(name, "hello")
    fleet.freeze(name, name)
    fleet.cache.evict()
    _kill(fleet, moment, lambda gateway: gateway.http.post(f"/admin/windows/{name}/thaw", json={}))
    thawed = fleet.stays.http.post(f"/admin/windows/{name}/thaw", json={})
    assert thawed.status_code == 200, thawed.text
    assert {key: (fleet.cache.folder / key).read_bytes() for key in fleet.frozen[name]} == fleet.frozen[name]


@pytest.mark.parametrize(
    "moment",
    [
        case("import", BeforeFile("os.rename", "kv-pins", 3)),
        case("import", InTransaction("INSERT windows")),
        case("import", AfterCommit("INSERT windows")),
    ],
)
def test_killed_in_an_import(fleet: Fleet, moment: Moment, request: pytest.FixtureRequest) -> None:
    name = of_name(request)
    fleet.say(name, "hello")
    fleet.freeze(name, f"{name}-before")
    file = fleet.stays.http.get(f"/admin/windows/{name}-before/export").content
    path = f"/admin/windows/import?window_name={name}"
    _kill(fleet, moment, lambda gateway: gateway.http.post(path, content=file), of="")
    again = fleet.stays.http.post(path, content=file)
    assert again.status_code == (409 if isinstance(moment, AfterCommit) else 201), again.text
    _whole(fleet, name)
    assert sorted(fleet.files(name).values()) == sorted(fleet.frozen[f"{name}-before"].values())


@pytest.mark.parametrize(
    "moment", [case("turn", InTransaction("INSERT turns")), case("turn", AfterCommit("INSERT turns"))]
)
def test_killed_when_it_records_a_turn(fleet: Fleet, moment: Moment, request: pytest.FixtureRequest) -> None:
    name = of_name(request)
    fleet.say(name, "hello")
    fleet.freeze(name, f"{name}-before")
    _kill(fleet, moment, lambda gateway: gateway.chat(name, "and this"))
    recorded = 1 + isinstance(moment, AfterCommit)
    assert fleet.stays.http.get(f"/admin/sessions/{name}").json()["turn_count"] == recorded
    fleet.say(name, "more")
    assert len(fleet.stays.turns(name, recorded + 1)) == recorded + 1
    fleet.freeze(name, name)


@pytest.mark.parametrize(
    "moment", [case("drain", InTransaction("INSERT auto_freezes")), case("drain", AfterCommit("INSERT windows"))]
)
def test_killed_in_a_drain(fleet: Fleet, moment: Moment, request: pytest.FixtureRequest) -> None:
    name = of_name(request)
    fleet.say(name, "hello")
    fleet.freeze(name, f"{name}-before")
    fleet.say(name, "more")
    engine = fleet.stays.http.get(f"/admin/sessions/{name}").json()["engine"]
    _kill(fleet, moment, lambda gateway: gateway.http.post("/admin/engines/drain", json={"engine": engine}))

    def drained() -> bool:
        done = fleet.stays.http.post("/admin/engines/drain", json={"engine": engine}).json()
        return bool(done["waiting_for"]["sessions"] == 0)

    eventually(drained, "the other one drains it", LEASE_S + 20)
    (window,) = fleet.stays.http.get(f"/admin/windows?session_id={name}&limit=1").json()["windows"]
    _whole(fleet, window["name"])
    fleet.stays.http.post("/admin/engines/drain", json={"engine": engine, "undo": True})


def _kill(fleet: Fleet, moment: Moment, work: Callable[[Gateway], object], of: str | None = None) -> None:
    """Kill a gateway at a moment of some work, and check what that left.

    `of` is in the name of the files that count: the salt of what was frozen last if it is not given.
    """
    if of is None:
        of = min([*fleet.frozen.values()][-1]).rpartition("@")[2]
    fleet.moments.kill(fleet.victim(), moment, work, of)
    fleet.check()


def _whole(fleet: Fleet, window: str) -> None:
    """A window has everything, as a gateway sees it."""
    verdict = fleet.stays.http.post(f"/admin/windows/{window}/verify").json()
    assert verdict["ok"], verdict
    assert verdict["chunks_usable"] == verdict["chunks_expected"] > 0
    assert fleet.stays.http.get(f"/admin/windows/{window}/messages").json()["messages"]
