"""How well the gateway's sessions match the true conversations.

Each turn is judged by the sessions of the turns that were sent before it:

- A turn *joined* if the gateway put it into a session that already had turns. It joined *correctly* if all of these
  belong to its own conversation: one turn of another conversation contaminates a session for all later turns.
- A turn is *continuing* if its conversation already had turns. It was *recognised* if it is in the session of the
  latest of them.
- **Precision** is the share of correct turns among those that joined; **recall** is the share of recognised turns
  among the continuing ones.
- A *fork* was recognised if it opened a session in the lineage of the session that it forked from.
- A *new* conversation was kept apart if it opened a session in a lineage that no other conversation uses.

Turns of which the client never saw a session id (it disconnected before the head of the response) are not judged.
*In pairs*: of all pairs of turns in one session, the share that belong to one conversation, and the converse; here a
conversation that is split once in its middle loses half of its pairs.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loadtests.identity_conversation import Request


@dataclass(frozen=True, slots=True)
class Observation:
    """A request and the session that its response named; "" if the client saw none."""

    request: Request
    session: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one turn. `correct` is None if it opened a session; `fault` says what happened instead."""

    request: Request
    session: str
    joined: bool
    correct: bool | None
    continues: bool
    matched: bool
    fault: str = ""


def judge(observations: Sequence[Observation], lineages: Mapping[str, str]) -> list[Verdict]:
    """Judge turns in the order in which they were sent; `lineages` maps each session to its lineage."""
    return list(_Judge(lineages).all(observations))


class _Judge:
    def __init__(self, lineages: Mapping[str, str]) -> None:
        self._lineages = lineages
        self._turns: defaultdict[str, set[str]] = defaultdict(set)  # the conversations in each session
        self._latest: dict[str, str] = {}  # the session of each conversation's latest turn
        self._holders: defaultdict[str, set[str]] = defaultdict(set)  # the conversations in each lineage

    def all(self, observations: Iterable[Observation]) -> Iterator[Verdict]:
        for observed in observations:
            if observed.session:
                yield self._verdict(observed.request, observed.session)
                self._turns[observed.session].add(observed.request.conversation)
                self._latest[observed.request.conversation] = observed.session
                self._holders[self._lineages[observed.session]].add(observed.request.conversation)

    def _verdict(self, request: Request, session: str) -> Verdict:
        others = self._turns[session]
        joined = bool(others)
        before = self._latest.get(request.conversation)
        fault = self._fault_of_continuing(session, before) if before else self._fault_of_first(request, session)
        correct = others == {request.conversation} if joined else None
        return Verdict(request, session, joined, correct, before is not None, not fault, fault)

    def _fault_of_continuing(self, session: str, before: str) -> str:
        if session == before:
            return ""
        where = self._where(session)
        return f"{where}, same lineage" if self._lineages[session] == self._lineages[before] else where

    def _fault_of_first(self, request: Request, session: str) -> str:
        if self._turns[session]:
            origin = self._latest.get(request.forked_from)
            return "the session that it forked from" if session == origin else "a session of another conversation"
        lineage = self._lineages[session]
        if request.relation != "fork":
            return "the lineage of another conversation" if self._holders[lineage] - {request.conversation} else ""
        return (
            ""
            if lineage == self._lineages.get(self._latest.get(request.forked_from, ""))
            else "a new session, new lineage"
        )

    def _where(self, session: str) -> str:
        return "a session of another conversation" if self._turns[session] else "a new session"


@dataclass(frozen=True, slots=True)
class Score:
    """Counts over some verdicts; the module's docstring defines the terms."""

    turns: int
    joined: int
    correct: int
    continuing: int
    recognised: int
    forks: int
    forks_recognised: int
    new: int
    separate: int

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> "Score":
        """Count the verdicts."""
        continuing = [v for v in verdicts if v.continues]
        forks = [v for v in verdicts if not v.continues and v.request.relation == "fork"]
        new = [v for v in verdicts if not v.continues and v.request.relation != "fork"]
        return cls(
            turns=len(verdicts),
            joined=sum(v.joined for v in verdicts),
            correct=sum(v.correct is True for v in verdicts),
            continuing=len(continuing),
            recognised=sum(v.matched for v in continuing),
            forks=len(forks),
            forks_recognised=sum(v.matched for v in forks),
            new=len(new),
            separate=sum(v.matched for v in new),
        )

    @property
    def precision(self) -> float:
        """The share of correct turns among those that joined; 1 if none joined."""
        return self.correct / self.joined if self.joined else 1.0

    @property
    def recall(self) -> float:
        """The share of recognised turns among the continuing ones; 1 if none is continuing."""
        return self.recognised / self.continuing if self.continuing else 1.0


def by_trace(verdicts: Sequence[Verdict]) -> dict[str, Score]:
    """Return the score of each kind of conversation."""
    return {name: Score.of(group) for name, group in _grouped((v.request.trace, v) for v in verdicts).items()}


def by_step(verdicts: Sequence[Verdict]) -> dict[str, Score]:
    """Return the score of each kind of step."""
    return {name: Score.of(group) for name, group in _grouped((v.request.step, v) for v in verdicts).items()}


def by_client(verdicts: Sequence[Verdict]) -> dict[str, Score]:
    """Return the score of each client style."""
    return {name: Score.of(group) for name, group in _grouped((v.request.client, v) for v in verdicts).items()}


def misses(verdicts: Sequence[Verdict]) -> Counter[tuple[str, str, str]]:
    """Count the faults by kind of conversation, step, and where the gateway put the turn."""
    return Counter((v.request.trace, v.request.step, v.fault) for v in verdicts if v.fault)


def contaminated(verdicts: Sequence[Verdict]) -> Counter[tuple[str, str, str]]:
    """Count turns that are in their own session, which also contains a turn of another conversation."""
    return Counter((v.request.trace, v.request.step, "") for v in verdicts if v.correct is False and not v.fault)


def pair_scores(verdicts: Sequence[Verdict]) -> tuple[float, float]:
    """Return precision and recall over pairs of turns."""
    both = _pairs(Counter((v.session, v.request.conversation) for v in verdicts))
    together = _pairs(Counter(v.session for v in verdicts))
    true = _pairs(Counter(v.request.conversation for v in verdicts))
    return both / together if together else 1.0, both / true if true else 1.0


def _pairs(counts: Mapping[object, int]) -> int:
    return sum(n * (n - 1) // 2 for n in counts.values())


def _grouped(named_verdicts: Iterable[tuple[str, Verdict]]) -> dict[str, list[Verdict]]:
    groups: defaultdict[str, list[Verdict]] = defaultdict(list)
    for name, verdict in named_verdicts:
        groups[name].append(verdict)
    return dict(sorted(groups.items()))
