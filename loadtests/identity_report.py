"""The report of `identity_replay`: the targets, the scores of every kind of conversation, and the misses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loadtests import identity_score
from loadtests.identity_score import Score

if TYPE_CHECKING:
    from loadtests.identity_replay import Run

PRECISION, RECALL = 0.998, 0.995
# Steps that no recognition by prefix can match, and steps that a human may judge differently; see the notes.
SUMMARISED = ("after a summary", "after old tool results were cleared")
FIRST_AGAIN = ("the first question again", "the first message edited")


def markdown(run: Run) -> str:
    """Return the report as Markdown."""
    parts = [
        _head(run),
        "## Targets\n\n" + _targets(run),
        "## By kind of conversation\n\n" + _table(identity_score.by_trace(run.verdicts)),
        "## Prefix cache hits\n\n" + _cached(run),
        "## By step\n\n" + _table(identity_score.by_step(run.verdicts)),
        "## By client\n\n" + _table(identity_score.by_client(run.verdicts)),
        "## Misses\n\n" + _misses(run),
        "## Definitions\n\n" + _notes(run),
    ]
    return "\n\n".join(parts) + "\n"


def _head(run: Run) -> str:
    facts, turns = run.machine, len(run.verdicts) + run.unseen
    conversations = len({verdict.request.conversation for verdict in run.verdicts})
    p50, p99 = (run.durations_ms[int(len(run.durations_ms) * share)] for share in (0.5, 0.99))
    kinds = ", ".join(f"{count:,} {how}" for how, count in sorted(run.kinds.items(), key=lambda kind: -kind[1]))
    return (
        "# Recognising conversations without ids\n\n"
        "Written by `python -m loadtests.identity_replay`; each turn's verdict is in `identity_replay.json`.\n\n"
        f"- {facts['date']}; {facts['cpu']}, {facts['cores']} cores, {facts['memory']}, {facts['system']}, "
        f"Python {facts['python']}; gateway {run.version} with its defaults\n"
        f"- {turns:,} chat completions of {conversations:,} conversations without ids; seed {run.seed}, "
        f"{run.workers} concurrent; {run.duration_s:.0f} s, {turns / run.duration_s:,.0f} turns/s, "
        f"a turn {p50:.1f} ms at the median, {p99:.1f} ms at the 99th percentile, engine and client on the same cores\n"
        f"- the gateway opened {sum(run.kinds.values()):,} sessions: {kinds}"
    )


def _targets(run: Run) -> str:
    score = Score.of(run.verdicts)
    precision, recall = identity_score.pair_scores(run.verdicts)
    rows = [
        ["", "target", "measured", "", "met"],
        ["---", "---:", "---:", "---", "---"],
        _target("precision", PRECISION, score.precision, f"{score.correct:,} of {score.joined:,} turns that joined"),
        _target("recall", RECALL, score.recall, f"{score.recognised:,} of {score.continuing:,} turns that continue"),
        ["forks", "", _share(score.forks_recognised, score.forks), "a new session in the lineage that it forked from",
         ""],
        ["kept apart", "", _share(score.separate, score.new), "new conversations with their own session and lineage",
         ""],
        ["precision, in pairs of turns", "", f"{precision:.2%}", "", ""],
        ["recall, in pairs of turns", "", f"{recall:.2%}", "", ""],
    ]  # fmt: skip
    return "\n".join(map(_line, rows))


def _target(name: str, target: float, measured: float, text: str) -> list[str]:
    return [name, f">= {target:.1%}", f"{measured:.2%}", text, "yes" if measured >= target else "**no**"]


def _table(scores: Mapping[str, Score]) -> str:
    rows = [
        [
            "",
            "turns",
            "joined",
            "correctly",
            "continuing",
            "recognised",
            "forks",
            "forks recognised",
            "new",
            "kept apart",
        ],
        ["---", *["---:"] * 9],
    ]
    for name, s in scores.items():
        rows.append([
            name, f"{s.turns:,}", f"{s.joined:,}", _share(s.correct, s.joined), f"{s.continuing:,}",
            _share(s.recognised, s.continuing), _some(s.forks), _share(s.forks_recognised, s.forks), _some(s.new),
            _share(s.separate, s.new),
        ])  # fmt: skip
    return "\n".join(map(_line, rows))


def _cached(run: Run) -> str:
    rows = [["", "prompt tokens", "engine alone", "through the gateway", "turns below"], ["---", *["---:"] * 4]]
    for name, hits in run.cached.items():
        shares = (f"{part / hits.tokens:.1%}" for part in (hits.alone, hits.gateway))
        rows.append([name, f"{hits.tokens:,}", *shares, f"{hits.below:,} of {hits.turns:,}"])
    alone, gateway, tokens = (
        sum(getattr(f, name) for f in run.cached.values()) for name in ("alone", "gateway", "tokens")
    )
    below = sum(hits.below for hits in run.cached.values())
    rows.append(["**all**", f"{tokens:,}", f"{alone / tokens:.2%}", f"{gateway / tokens:.2%}", f"{below:,}"])
    return "\n".join(map(_line, rows))


def _misses(run: Run) -> str:
    missed, contaminated = identity_score.misses(run.verdicts), identity_score.contaminated(run.verdicts)
    if not missed and not contaminated:
        return "None."
    rows = [["conversation", "step", "the gateway put it into", "turns"], ["---", "---", "---", "---:"]]
    rows += _counted(missed)
    rows += _counted(Counter({(trace, step, "its own session, which contains a turn of another"): count
                              for (trace, step, _), count in contaminated.items()}))  # fmt: skip
    return "\n".join(map(_line, rows))


def _counted(counter: Counter[tuple[str, str, str]]) -> list[list[str]]:
    return [[*key, f"{count:,}"] for key, count in counter.most_common()]


def _notes(run: Run) -> str:
    by_step = identity_score.by_step(run.verdicts)
    summaries, again = _sum(by_step, SUMMARISED), _sum(by_step, FIRST_AGAIN)
    score = Score.of(run.verdicts)
    without = score.continuing - summaries.continuing
    human_recall = (score.recognised + again.turns - again.separate) / (score.continuing + again.turns)
    recall = (score.recognised - summaries.recognised) / without if without else 1.0
    return "\n\n".join((
        "\n".join((identity_score.__doc__ or "").strip().splitlines()[2:]),
        f"- A history that became a summary, or lost its old tool results ({summaries.turns} turns), is the same "
        "conversation to a human. It counts as a miss for the one turn after which the gateway continues with the new "
        f"session: no prefix is left, or only an older one. Without these turns recall is {recall:.2%}.",
        f"- A first question that is repeated after it was answered, or an edited first message ({again.turns} turns), "
        "is a new conversation by our rule, as two unrelated clients with the same words are two sessions. If it "
        "counted as the same conversation, as its author would say, each would be a miss, and recall would be "
        f"{human_recall:.2%}.",
        "- Unrelated clients with the same first reply have exchanged identical messages when they continue, so their "
        "sessions cannot be told apart. No reply is computed from the other's messages, but the session that the first "
        "response named may be the other client's from then on. A swap counts against both.",
        "- Side conversations (a memory extractor, a title from the whole thread) count as forks: a separate session, "
        "in the lineage of the conversation that they were given.",
        "- Prefix cache hits come from a model of vLLM's prefix cache: unlimited blocks of 32 tokens (of four "
        "characters each); a block is a hit if it and all blocks before it were computed under the same salt. Through "
        "the gateway the salt is that of the session's lineage, and lines that `normalise` removes are gone. The "
        "engine alone has no salt; as the gateway deliberately isolates unrelated clients, each conversation is "
        "compared with an engine of its own, shared only with its forks and side conversations. A conversation that "
        "begins with nothing of another one (a title from quoted text, a sub-agent with its own task) is separate in "
        "both.",
        f"- {run.unseen} requests were given up by their client before it saw a session; the turns after them are "
        "judged.",
    ))  # fmt: skip


def _sum(scores: Mapping[str, Score], names: Sequence[str]) -> Score:
    selected = [scores[name] for name in names if name in scores]
    return Score(*(sum(getattr(score, name) for score in selected) for name in Score.__slots__))


def _share(part: int, total: int) -> str:
    return f"{part / total:.1%}" if total else ""


def _some(count: int) -> str:
    return f"{count:,}" if count else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
