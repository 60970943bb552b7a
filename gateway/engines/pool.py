"""All engines: which of them gets a request, and which is next if that one does not answer.

A session goes to the engine that has its KV: the one that served it last, else the one with the highest random weight
for its lineage (when an engine goes, only its own lineages move). Then come the engines of the same node, whose cache
has it in memory. Any other engine finds the KV in the shared tiers. A turn leaves the engine that comes first only if
its queue says that waiting there costs more than loading elsewhere.

A request is sent to the next engine only while no part of a response has come: the connection was refused or closed. A
request that had been sent may be what crashed the engine, so it is sent to one more at most; one that had not is tried
on each once. A 503 is an engine's way to refuse a request before it begins: the request is sent to a healthy engine, or
the 503 is forwarded if there is none, as every other response is.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from gateway.engines.cache_use import CacheUse
from gateway.engines.client import EngineClient, Model, Reply
from gateway.engines.connection import UNREACHABLE_HINT, Connection, Headers, UpstreamError
from gateway.engines.node import HEALTHY, EngineNode
from gateway.errors import GatewayError

log = logging.getLogger(__name__)

LoadTime = Callable[[str, int], float]
"""Seconds that loading so many tokens into a cache takes, about; its first argument is the cache's URL."""
_MOVE_S = 1.0  # seconds by which another engine must be better: an estimate is only that

_T = TypeVar("_T")


class EnginePool(EngineClient):
    """The engines, in the order of the settings. As an `EngineClient` it asks any healthy one."""

    def __init__(self, members: Sequence[EngineNode], check_s: float) -> None:
        self.members = list(members)
        self.load_s: LoadTime = _no_time  # set where there are caches to load from
        self.missing: dict[str, str] = {}  # names that are looked up for engines: why one has none
        self._check_s = check_s
        self._watches: dict[EngineNode, asyncio.Task[None]] = {}
        self._next = 0  # round robin for requests without a lineage
        self._differing: dict[str, dict[str, str]] = {}
        self._agreed: dict[str, Model] = {}  # as of the last probe

    async def __aenter__(self) -> "EnginePool":
        for member in self.members:
            self._watch(member)
        return self

    async def __aexit__(self, *_: object) -> None:
        for member in list(self.members):
            await self.remove(member)

    def add(self, member: EngineNode) -> None:
        """Take in an engine that was found while the gateway runs."""
        self.members.append(member)
        self._watch(member)

    async def remove(self, member: EngineNode) -> None:
        """Forget an engine. Streams that it still sends go on."""
        self.members.remove(member)
        self._tell_rivals()
        watch = self._watches.pop(member)
        watch.cancel()
        await asyncio.wait([watch])
        await member.close()

    def _watch(self, member: EngineNode) -> None:
        self._tell_rivals()
        self._watches[member] = asyncio.create_task(
            member.watch(self._check_s, self._compare), name=f"watch {member.url}"
        )

    def _tell_rivals(self) -> None:
        for member in self.members:
            member.has_rivals = len(self.members) > 1

    @property
    def up(self) -> list[EngineNode]:
        """The engines that were healthy when last probed."""
        return [member for member in self.members if member.up]

    def choose(self, lineage: str, prefer: str = "", model: str = "") -> list[EngineNode]:
        """Return the engines to try for a request, in that order; empty if none is reachable.

        `prefer` is the URL of the engine that served the session last. Only engines that serve `model` are tried, or
        any of them if none is known to serve it. Without a lineage the engines take turns.
        """
        if len(self.members) == 1:
            return [] if self.members[0].is_unreachable else self.members[:]
        serving = [m for m in self.members if model and m.engine.known(model)] or self.members
        if not serving:
            return []
        order = self._by_affinity(serving, lineage, prefer)
        now, agreed = time.monotonic(), self._agreed.get(model) if model in self._differing else None
        ranks = {m: (m.rank(now, first=place == 0), _is_other(m, agreed)) for place, m in enumerate(order)}
        return sorted((m for m in order if not m.is_unreachable), key=ranks.__getitem__)

    def place(self, lineage: str, prefer: str = "", model: str = "", tokens: int = 0) -> EngineNode | None:
        """The engine for a turn of so many tokens: the first to try, unless its queue is too long. None: there is none.

        Give it to `route` as `placed`, or the turn may go to another one than was prepared.
        """
        chosen = self.choose(lineage, prefer, model)
        return self._less_busy(chosen, tokens)[0] if chosen else None

    def any(self, model: str = "") -> EngineNode:
        """An engine for a request of the gateway's own. Raises `engine_unreachable`."""
        chosen = self.choose("", model=model)
        if not chosen:
            raise GatewayError("engine_unreachable", self.trouble(), hint=UNREACHABLE_HINT)
        return chosen[0]

    def route(
        self, lineage: str, prefer: str = "", model: str = "", *, tokens: int = 0, placed: EngineNode | None = None
    ) -> "Route":
        """The route of one request, by `placed` first if that engine was chosen for it before."""
        chosen = self.choose(lineage, prefer if placed is None else placed.url, model)
        return Route(self, chosen if placed is not None or len(chosen) < 2 else self._less_busy(chosen, tokens))

    def for_lineage(self, lineage: str, prefer: str = "") -> "AffinityClient":
        """A client for the gateway's own requests that prefers the engine that has the KV of a lineage."""
        return AffinityClient(self, lineage, prefer)

    def beside(self, cache: str, *, only: bool = False) -> list[str]:
        """The URLs of the engines of a node, by the URL of its cache; all of them if that is the `only` cache."""
        return [member.url for member in self.members if only or member.cache == cache]

    def trouble(self) -> str:
        """Why no engine can be reached."""
        reasons = [m.last_error or f"{m.url} was not tried" for m in self.members]
        return "no engine can be reached: " + "; ".join([*reasons, *self.missing.values()])

    def known(self, name: str) -> Model | None:
        """A model as last reported, by most of the engines that are up if they differ.

        No name means the first model of the first engine that is up.
        """
        if len(self.members) == 1:
            return self.members[0].engine.known(name)
        if name in self._agreed:
            return self._agreed[name]
        for member in self.members if name else self.up:
            if (model := member.engine.known(name)) is not None:
                return model
        return None

    async def look_up(self, name: str) -> Model | None:
        """Return a model, None if no engine has it.

        For an unknown one each engine is asked at most once a second: clients may send any name. Raises
        `engine_unreachable`, `engine_timeout` if no engine answers.
        """
        if (model := self.known(name)) is not None:
            return model
        if len(self.members) == 1:
            return await self.members[0].engine.look_up(name)
        tasks = [asyncio.create_task(_or_error(m.engine.look_up(name))) for m in self.up or self.members]
        failed: list[GatewayError] = []
        try:
            for first in asyncio.as_completed(tasks):
                answer = await first
                if isinstance(answer, Model):
                    return answer
                if isinstance(answer, GatewayError):
                    failed.append(answer)
        finally:
            for task in tasks:
                task.cancel()
        if len(failed) == len(tasks):
            raise failed[0]
        return None

    async def models(self) -> dict[str, Model]:
        """Ask all engines that are up which models they serve. Raises `engine_unreachable`, `engine_timeout`."""
        answers = await asyncio.gather(*(_or_error(m.engine.models()) for m in self.up or self.members))
        failed = [answer for answer in answers if isinstance(answer, GatewayError)]
        if len(failed) == len(answers):
            raise failed[0]
        return _agreed([answer for answer in answers if not isinstance(answer, GatewayError)])

    def cards(self) -> list[dict[str, Any]]:
        """The models of all engines that are up, each as the first engine to serve it describes it."""
        cards: dict[str, dict[str, Any]] = {}
        for member in self.up:
            for card in member.engine.cards:
                cards.setdefault(str(card["id"]), card)
        return list(cards.values())

    @property
    def differing(self) -> Mapping[str, Mapping[str, str]]:
        """The models that are not the same on all engines, each with its root by engine."""
        return self._differing

    async def ask(self, method: str, path: str, *, json: Mapping[str, Any] | None = None, quick: bool = False) -> Reply:
        return await self.for_lineage("").ask(method, path, json=json, quick=quick)

    async def probe(self) -> None:
        """Probe all engines now."""
        await asyncio.gather(*(member.probe() for member in self.members))
        self._compare()

    async def cache_use(self) -> CacheUse | None:
        """How full the own caches of all engines that are up are; None if none of them says."""
        answers = await asyncio.gather(*(member.engine.cache_use() for member in self.up))
        known = [one for one in answers if one is not None]
        return CacheUse.total(known) if known else None

    def _compare(self) -> None:
        differing = _differing(self.members)
        for name in differing.keys() - self._differing.keys():
            log.warning("model %r is not the same on all engines: %s", name, differing[name])
        self._differing = differing
        self._agreed = _agreed([{model.id: model for model in member.engine.served} for member in self.up])

    def _by_affinity(self, members: Sequence[EngineNode], lineage: str, prefer: str) -> list[EngineNode]:
        if not lineage:
            self._next += 1
            start = self._next % len(members)
            return [*members[start:], *members[:start]]
        key = lineage.encode()
        order = sorted(members, key=lambda member: member.weight(key), reverse=True)
        home = next((member for member in order if member.url == prefer), order[0])
        order.sort(key=lambda member: 0 if member is home else 1 if member.cache and member.cache == home.cache else 2)
        return order

    def _less_busy(self, order: list[EngineNode], tokens: int) -> list[EngineNode]:
        """The engines with the one in front at which a turn would begin first: it waits there, or has its KV loaded."""
        home, now = order[0], time.monotonic()
        if not (wait_s := home.queue.wait_s()):
            return order
        home_rank = home.rank(now, first=False)
        costs = {home: wait_s}
        for member in order[1:]:
            if member.rank(now, first=False) == home_rank == HEALTHY:
                costs[member] = member.queue.wait_s() + self.load_s(member.cache, tokens) + _MOVE_S
        best = min(costs, key=costs.__getitem__)
        if best is home:
            return order
        best.queue.add()
        return [best, *(member for member in order if member is not best)]


class AffinityClient(EngineClient):
    """An `EngineClient` that prefers the engine of one lineage."""

    def __init__(self, engines: EnginePool, lineage: str, prefer: str) -> None:
        self._engines = engines
        self._lineage = lineage
        self._prefer = prefer

    async def models(self) -> dict[str, Model]:
        return await self._engines.models()

    async def ask(self, method: str, path: str, *, json: Mapping[str, Any] | None = None, quick: bool = False) -> Reply:
        """Ask the engines in turn until one answers; see `EngineClient.ask`."""
        failed = GatewayError("engine_unreachable", self._engines.trouble(), hint=UNREACHABLE_HINT)
        for member in self._engines.choose(self._lineage, self._prefer, str((json or {}).get("model", ""))):
            try:
                answer = await member.engine.ask(method, path, json=json, quick=quick)
            except GatewayError as error:
                if error.code != "engine_unreachable":
                    raise
                member.unanswered(error.message)
                failed = error
            else:
                member.answered()
                return answer
        raise failed


class Route:
    """Where one request goes: like `Upstream`, but over several engines."""

    __slots__ = ("_engines", "_member", "_members")

    def __init__(self, engines: EnginePool, members: Sequence[EngineNode]) -> None:
        self._engines = engines
        self._members = members
        self._member: EngineNode | None = None

    @property
    def engine(self) -> str:
        """The URL of the engine that answered, or ""."""
        return self._member.url if self._member else ""

    async def send(
        self, method: str, target: bytes, headers: Headers, body: bytes, *, may_load: bool = False
    ) -> Connection:
        """See `Upstream.send`; `may_load`: the engine may find KV of the prompt in the cache."""
        failed: UpstreamError | None = None
        was_sent = False
        for place, member in enumerate(self._members):
            try:
                grace_s = member.engine.grace_s if may_load else 0.0
                connection = await member.upstream.send(method, target, headers, body, grace_s=grace_s)
            except UpstreamError as error:
                if error.code != "engine_unreachable":
                    raise
                member.unanswered(str(error))
                failed = error
                if error.sent and was_sent:
                    break
                was_sent = was_sent or error.sent
                continue
            if connection.status == 503:
                member.unanswered(f"engine at {member.url} answered 503")
                if self._has_healthy_after(place):
                    member.upstream.release_or_abort(connection)
                    continue
            else:
                member.answered()
            self._member = member
            return connection
        raise failed or UpstreamError("engine_unreachable", self._engines.trouble(), began=False)

    def release_or_abort(self, connection: Connection) -> None:
        if self._member is None:
            return
        if connection.broken:
            self._member.probe_soon()
        self._member.upstream.release_or_abort(connection)

    def _has_healthy_after(self, place: int) -> bool:
        now = time.monotonic()
        return any(member.rank(now, first=False) == HEALTHY for member in self._members[place + 1 :])


def _no_time(_cache: str, _tokens: int) -> float:
    return 0.0


def _is_other(member: EngineNode, agreed: Model | None) -> bool:
    """Whether an engine serves another model under this name, whose KV has other names."""
    known = member.engine.known(agreed.id) if agreed else None
    return known is not None and agreed is not None and known.root != agreed.root


def _agreed(answers: Sequence[Mapping[str, Model]]) -> dict[str, Model]:
    """Each model as most engines serve it, or the first of as many."""
    by_root: dict[str, dict[str, list[Model]]] = {}
    for served in answers:
        for name, model in served.items():
            by_root.setdefault(name, {}).setdefault(model.root, []).append(model)
    return {name: max(same.values(), key=len)[0] for name, same in by_root.items()}


def _differing(members: Sequence[EngineNode]) -> dict[str, dict[str, str]]:
    """Of each model that several engines serve and not all from the same root: its root by engine."""
    roots: dict[str, dict[str, str]] = {}
    for member in members:
        for card in member.engine.cards:
            roots.setdefault(str(card["id"]), {})[member.url] = str(card.get("root") or card["id"])
    return {name: by_url for name, by_url in roots.items() if len(set(by_url.values())) > 1}


async def _or_error(answer: Awaitable[_T]) -> _T | GatewayError:
    try:
        return await answer
    except GatewayError as error:
        return error
