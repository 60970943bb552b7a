"""The report of `identity_replay`: the two targets, what every kind of conversation came to, and every miss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loadtests import identity_score
from loadtests.identity_score import Score

if TYPE_CHECKING:
    from loadtests.identity_replay import Run

PRECISION, RECALL = 0.998, 0.995
# What no recognition by prefix can know, and what a human would say otherwise than our rules; see the notes.
SUMMARISED = ("after a summary", "after old tool results were cleared")
FIRST_AGAIN = ("the first question again", "the first message edited")


def markdown(run: Run) -> str:
    """The whole report."""
    parts = [
        _head(run),
        "## Targets\n\n" + _targets(run),
        "## By kind of conversation\n\n" + _table(identity_score.by_trace(run.verdicts)),
        "## What the cache finds\n\n" + _cached(run),
        "## By what happened\n\n" + _table(identity_score.by_step(run.verdicts)),
        "## By client\n\n" + _table(identity_score.by_client(run.verdicts)),
        "## What the misses are\n\n" + _misses(run),
        "## How it is counted\n\n" + _notes(run),
    ]
    return "\n\n".join(parts) + "\n"


def _head(run: Run) -> str:
    facts, turns = run.machine, len(run.verdicts) + run.unseen
    talks = len({verdict.request.conversation for verdict in run.verdicts})
    p50, p99 = (run.took_ms[int(len(run.took_ms) * share)] for share in (0.5, 0.99))
    kinds = ", ".join(f"{count:,} {how}" for how, count in sorted(run.kinds.items(), key=lambda kind: -kind[1]))
    return (
        "# Which conversation is this?\n\n"
        "Written by `python -m loadtests.identity_replay`; each turn's verdict is in `identity_replay.json`.\n\n"
        f"- {facts['date']}; {facts['cpu']}, {facts['cores']} cores, {facts['memory']}, {facts['system']}, "
        f"Python {facts['python']}; gateway {run.version} with its defaults\n"
        f"- {turns:,} chat completions of {talks:,} conversations, none of which names itself; seed {run.seed}, "
        f"{run.workers} at the same time; {run.duration_s:.0f} s, {turns / run.duration_s:,.0f} turns/s, "
        f"a turn {p50:.1f} ms at the median, {p99:.1f} ms at the 99th percentile, engine and client on the same cores\n"
        f"- the gateway opened {sum(run.kinds.values()):,} sessions: {kinds}"
    )


def _targets(run: Run) -> str:
    score = Score.of(run.verdicts)
    precision, recall = identity_score.pairs(run.verdicts)
    rows = [
        ["", "asked", "seen", "", "met"],
        ["---", "---:", "---:", "---", "---"],
        _target("precision", PRECISION, score.precision, f"{score.right:,} of {score.joined:,} turns that joined"),
        _target("recall", RECALL, score.recall, f"{score.recognised:,} of {score.goes_on:,} turns that go on"),
        ["forks", "", _share(score.forks_known, score.forks), "a session of its own in the lineage that it left", ""],
        ["kept apart", "", _share(score.apart, score.new), "new conversations with a session and lineage of their own",
         ""],
        ["precision, in pairs of turns", "", f"{precision:.2%}", "", ""],
        ["recall, in pairs of turns", "", f"{recall:.2%}", "", ""],
    ]  # fmt: skip
    return "\n".join(map(_line, rows))


def _target(name: str, asked: float, seen: float, of: str) -> list[str]:
    return [name, f">= {asked:.1%}", f"{seen:.2%}", of, "yes" if seen >= asked else "**no**"]


def _table(scores: Mapping[str, Score]) -> str:
    rows = [
        ["", "turns", "joined", "rightly", "go on", "recognised", "forks", "as such", "new", "kept apart"],
        ["---", *["---:"] * 9],
    ]
    for name, s in scores.items():
        rows.append([
            name, f"{s.turns:,}", f"{s.joined:,}", _share(s.right, s.joined), f"{s.goes_on:,}",
            _share(s.recognised, s.goes_on), _some(s.forks), _share(s.forks_known, s.forks), _some(s.new),
            _share(s.apart, s.new),
        ])  # fmt: skip
    return "\n".join(map(_line, rows))


def _cached(run: Run) -> str:
    rows = [
        ["", "prompt tokens", "engine alone", "through the gateway", "turns below"],
        ["---", *["---:"] * 4],
    ]
    for name, found in run.cached.items():
        shares = (f"{part / found.tokens:.1%}" for part in (found.alone, found.gateway))
        rows.append([name, f"{found.tokens:,}", *shares, f"{found.behind:,} of {found.turns:,}"])
    alone, gateway, tokens = (
        sum(getattr(f, name) for f in run.cached.values()) for name in ("alone", "gateway", "tokens")
    )
    behind = sum(found.behind for found in run.cached.values())
    rows.append(["**all**", f"{tokens:,}", f"{alone / tokens:.2%}", f"{gateway / tokens:.2%}", f"{behind:,}"])
    return "\n".join(map(_line, rows))


def _misses(run: Run) -> str:
    missed, spoilt = identity_score.misses(run.verdicts), identity_score.spoilt(run.verdicts)
    if not missed and not spoilt:
        return "There are none."
    rows = [["conversation", "turn", "the gateway put it in", "turns"], ["---", "---", "---", "---:"]]
    rows += _counted(missed)
    rows += _counted(Counter({(trace, step, "its session, which holds a turn of another"): count
                              for (trace, step, _), count in spoilt.items()}))  # fmt: skip
    return "\n".join(map(_line, rows))


def _counted(counter: Counter[tuple[str, str, str]]) -> list[list[str]]:
    return [[*key, f"{count:,}"] for key, count in counter.most_common()]


def _notes(run: Run) -> str:
    by_step = identity_score.by_step(run.verdicts)
    summaries, again = _sum(by_step, SUMMARISED), _sum(by_step, FIRST_AGAIN)
    score = Score.of(run.verdicts)
    without = score.goes_on - summaries.goes_on
    human = (score.recognised + again.turns - again.apart) / (score.goes_on + again.turns)
    rest = (score.recognised - summaries.recognised) / without if without else 1.0
    return "\n\n".join((
        "\n".join((identity_score.__doc__ or "").strip().splitlines()[2:]),
        f"- A history that became a summary, or lost its old tool results ({summaries.turns} turns), is the same "
        "conversation to a human, and counts as a miss for the one turn after which the gateway goes on with the new "
        f"session: no prefix is left, or only an older one. Without these turns recall is {rest:.2%}.",
        f"- A first question that comes again after it was answered, or an edited first message ({again.turns} turns), "
        "is a new conversation by our rule, for two strangers who say the same are two sessions. Called the same "
        f"conversation, as its author would, each is a miss, and recall is {human:.2%}.",
        "- Strangers with the same first reply have said and heard the very same when they go on: which session is "
        "whose cannot be known. No reply is made of the other's words, but the session that the first answer named may "
        "be the other's from then on. A swap spoils both for the count.",
        "- Side conversations (a memory extractor, a title from the whole thread) are counted as forks: a session of "
        "their own, in the lineage of the conversation that they were given.",
        "- What the cache finds is told by a model of vLLM's prefix cache: blocks of 32 tokens (of four characters), "
        "unlimited, a block found if it and all before it were computed under the same salt. Through the gateway the "
        "salt is that of the session's lineage, and lines that `normalise` removes are gone. The engine alone has no "
        "salt; but what strangers share is kept apart by the gateway on purpose, so each conversation is compared with "
        "an engine that it has to itself, with its forks and side conversations. What begins with nothing of another "
        "conversation (a title from quoted text, a sub-agent with a task of its own) counts as a conversation of its "
        "own in both.",
        f"- {run.unseen} requests were given up by their client before it saw a session; the turns after them are "
        "judged.",
    ))  # fmt: skip


def _sum(scores: Mapping[str, Score], names: Sequence[str]) -> Score:
    found = [scores[name] for name in names if name in scores]
    return Score(*(sum(getattr(score, name) for score in found) for name in Score.__slots__))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _some(count: int) -> str:
    return f"{count:,}" if count else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
