"""How well sessions and true conversations agree.

Each turn is judged by the sessions of the turns that were sent before it:

- It *joined* when the gateway put it in a session that had turns already. It joined *rightly* when all of these are of
  its own conversation: one turn of somebody else spoils a session for all that come later.
- It truly *goes on* when its conversation had turns already. It was *recognised* when it is in the session of the
  latest of them.
- **Precision** is the share of rightly joined turns among those that joined; **recall** that of the recognised among
  those that go on.
- A *fork* was recognised when it opened a session of the lineage of the session that it left.
- A *new* conversation was kept apart when it opened a session, and a lineage that no other conversation has.

Turns of which the client never saw a session id (it left before the head of the answer) are not judged. *In pairs*:
of any two turns of one session, the share that are of one conversation, and the other way round; here a conversation
that was lost once in its middle is lost for the half of its pairs.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loadtests.identity_talk import Request


@dataclass(frozen=True, slots=True)
class Seen:
    """A request and the session that its answer named, "" if none was seen."""

    request: Request
    session: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one turn. `right` is None for one that opened a session; `wrong` says what happened instead."""

    request: Request
    session: str
    joined: bool
    right: bool | None
    goes_on: bool
    hit: bool
    wrong: str = ""


def judge(seen: Sequence[Seen], lineages: Mapping[str, str]) -> list[Verdict]:
    """Judge turns in the order in which they were sent; `lineages` are those of the sessions."""
    return list(_Judge(lineages).all(seen))


class _Judge:
    def __init__(self, lineages: Mapping[str, str]) -> None:
        self._lineages = lineages
        self._turns: defaultdict[str, set[str]] = defaultdict(set)  # the conversations in each session
        self._latest: dict[str, str] = {}  # the session of each conversation's latest turn
        self._holders: defaultdict[str, set[str]] = defaultdict(set)  # the conversations in each lineage

    def all(self, seen: Iterable[Seen]) -> Iterator[Verdict]:
        for one in seen:
            if one.session:
                yield self._one(one.request, one.session)
                self._turns[one.session].add(one.request.conversation)
                self._latest[one.request.conversation] = one.session
                self._holders[self._lineages[one.session]].add(one.request.conversation)

    def _one(self, request: Request, session: str) -> Verdict:
        others = self._turns[session]
        joined = bool(others)
        before = self._latest.get(request.conversation)
        wrong = self._goes_on(session, before) if before else self._opens(request, session)
        right = others == {request.conversation} if joined else None
        return Verdict(request, session, joined, right, before is not None, not wrong, wrong)

    def _goes_on(self, session: str, before: str) -> str:
        if session == before:
            return ""
        where = self._where(session)
        return f"{where}, same lineage" if self._lineages[session] == self._lineages[before] else where

    def _opens(self, request: Request, session: str) -> str:
        if self._turns[session]:
            origin = self._latest.get(request.of)
            return "the session that it left" if session == origin else "a session of another conversation"
        lineage = self._lineages[session]
        if request.truth != "fork":
            return "the lineage of another conversation" if self._holders[lineage] - {request.conversation} else ""
        return "" if lineage == self._lineages.get(self._latest.get(request.of, "")) else "a new session, new lineage"

    def _where(self, session: str) -> str:
        return "a session of another conversation" if self._turns[session] else "a new session"


@dataclass(frozen=True, slots=True)
class Score:
    """Counts over some verdicts: of how many, and how many of them were right."""

    turns: int
    joined: int
    right: int
    goes_on: int
    recognised: int
    forks: int
    forks_known: int
    new: int
    apart: int

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> "Score":
        """Count."""
        going = [v for v in verdicts if v.goes_on]
        forks = [v for v in verdicts if not v.goes_on and v.request.truth == "fork"]
        new = [v for v in verdicts if not v.goes_on and v.request.truth != "fork"]
        return cls(
            turns=len(verdicts),
            joined=sum(v.joined for v in verdicts),
            right=sum(v.right is True for v in verdicts),
            goes_on=len(going),
            recognised=sum(v.hit for v in going),
            forks=len(forks),
            forks_known=sum(v.hit for v in forks),
            new=len(new),
            apart=sum(v.hit for v in new),
        )

    @property
    def precision(self) -> float:
        """See above; nothing joined is nothing wrong."""
        return self.right / self.joined if self.joined else 1.0

    @property
    def recall(self) -> float:
        """See above."""
        return self.recognised / self.goes_on if self.goes_on else 1.0


def by_trace(verdicts: Sequence[Verdict]) -> dict[str, Score]:
    """The score of each kind of conversation."""
    return {name: Score.of(some) for name, some in _grouped((v.request.trace, v) for v in verdicts).items()}


def by_step(verdicts: Sequence[Verdict]) -> dict[str, Score]:
    """The score of each thing that can happen."""
    return {name: Score.of(some) for name, some in _grouped((v.request.step, v) for v in verdicts).items()}


def by_client(verdicts: Sequence[Verdict]) -> dict[str, Score]:
    """The score of each way to send a conversation back."""
    return {name: Score.of(some) for name, some in _grouped((v.request.client, v) for v in verdicts).items()}


def misses(verdicts: Sequence[Verdict]) -> Counter[tuple[str, str, str]]:
    """Count what was not as it should be: the kind of conversation, what happened, where the gateway put it."""
    return Counter((v.request.trace, v.request.step, v.wrong) for v in verdicts if v.wrong)


def spoilt(verdicts: Sequence[Verdict]) -> Counter[tuple[str, str, str]]:
    """Count what is in the right place, but in a session that holds a turn of another conversation."""
    return Counter((v.request.trace, v.request.step, "") for v in verdicts if v.right is False and not v.wrong)


def pairs(verdicts: Sequence[Verdict]) -> tuple[float, float]:
    """Precision and recall over pairs of turns."""
    both = _pairs(Counter((v.session, v.request.conversation) for v in verdicts))
    together = _pairs(Counter(v.session for v in verdicts))
    true = _pairs(Counter(v.request.conversation for v in verdicts))
    return both / together if together else 1.0, both / true if true else 1.0


def _pairs(counts: Mapping[object, int]) -> int:
    return sum(n * (n - 1) // 2 for n in counts.values())


def _grouped(named: Iterable[tuple[str, Verdict]]) -> dict[str, list[Verdict]]:
    groups: defaultdict[str, list[Verdict]] = defaultdict(list)
    for name, verdict in named:
        groups[name].append(verdict)
    return dict(sorted(groups.items()))
