"""The identity replay: its score is right about what is known, its traces are what they say, and the targets hold."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson
import pytest

from gateway.dialects.chat import ChatDialect
from loadtests import contenders, identity_cache, identity_report, identity_score, identity_traces, scripted_upstream
from loadtests.identity_client_styles import CLIENTS, Client
from loadtests.identity_conversation import Request
from loadtests.identity_replay import fetch_sessions
from loadtests.identity_score import Observation, Score, Verdict
from loadtests.identity_sender import replay
from loadtests.scripted_upstream import Kind

TURNS = 600
_UNKNOWABLE = ("compaction", "unrelated clients, same first reply")  # see the notes in the report


@pytest.fixture(scope="module")
def trace() -> list[Request]:
    return identity_traces.generate(7, TURNS, pause_s=0.2)


def judged(trace: Sequence[Request], session_of: Callable[[Request], str]) -> list[Verdict]:
    """The verdicts on a gateway that names sessions like this; a name is `lineage/...`."""
    observations = [Observation(request, session_of(request)) for request in trace]
    return identity_score.judge(
        observations, {observed.session: observed.session.split("/")[0] for observed in observations}
    )


def true_sessions(trace: Sequence[Request]) -> dict[str, str]:
    """The true conversations, each under the lineage that it belongs to."""
    found: dict[str, str] = {}
    for request in trace:
        lineage = found[request.forked_from].split("/")[0] if request.forked_from else request.conversation
        found.setdefault(request.conversation, f"{lineage}/{request.conversation}")
    return found


# --- the score


def test_a_perfect_matcher_scores_in_full(trace: list[Request]) -> None:
    sessions = true_sessions(trace)
    verdicts = judged(trace, lambda request: sessions[request.conversation])
    score = Score.of(verdicts)
    assert (score.precision, score.recall) == (1.0, 1.0)
    assert score.continuing > TURNS / 2
    assert score.forks_recognised == score.forks > 0
    assert score.separate == score.new > 0
    assert identity_score.pair_scores(verdicts) == (1.0, 1.0)
    assert not identity_score.misses(verdicts)
    assert not identity_score.contaminated(verdicts)


def test_a_matcher_that_finds_nothing_has_no_recall_and_no_errors(trace: list[Request]) -> None:
    verdicts = judged(trace, lambda request: str(request.number))
    score = Score.of(verdicts)
    assert (score.precision, score.recall, score.forks_recognised) == (1.0, 0.0, 0)
    assert score.separate == score.new
    assert identity_score.pair_scores(verdicts) == (1.0, 0.0)


def test_a_matcher_that_finds_one_conversation_has_no_precision(trace: list[Request]) -> None:
    verdicts = judged(trace, lambda _: "one")
    score = Score.of(verdicts)
    assert (score.recall, score.forks_recognised) == (1.0, 0)
    assert score.precision < 0.05
    assert score.separate <= 1
    assert identity_score.pair_scores(verdicts)[0] < 0.1


def test_a_matcher_that_misses_forks_is_scored_so(trace: list[Request]) -> None:
    origin: dict[str, str] = {}
    for request in trace:
        origin.setdefault(request.conversation, origin.get(request.forked_from, request.conversation))
    score = Score.of(judged(trace, lambda request: origin[request.conversation]))
    assert score.forks_recognised == 0
    assert score.precision < 1.0


def test_one_turn_in_the_wrong_session_makes_the_following_ones_wrong() -> None:
    def turn(conversation: str, number: int) -> Request:
        relation = "same" if number else "new"
        return Request(
            number, conversation, "chat", "", relation, [], seed=0, stream=False, tools=False, client="", at=0.0
        )  # fmt: skip

    turns = [(turn("a", 0), "s"), (turn("b", 0), "t"), (turn("b", 1), "s"), (turn("a", 1), "s"), (turn("b", 2), "s")]
    verdicts = identity_score.judge([Observation(*turn) for turn in turns], {"s": "s", "t": "t"})
    assert [v.correct for v in verdicts] == [None, None, False, False, False]
    assert [v.matched for v in verdicts] == [True, True, False, True, True]
    assert verdicts[2].fault == "a session of another conversation"


def test_a_turn_of_an_unseen_session_is_not_scored(trace: list[Request]) -> None:
    observations = [Observation(request, "" if request.kind is Kind.STALLS else "s") for request in trace]
    assert len(identity_score.judge(observations, {"s": "s"})) == sum(
        request.kind is not Kind.STALLS for request in trace
    )


# --- the traces


def test_a_trace_is_the_same_every_time(trace: list[Request]) -> None:
    again = identity_traces.generate(7, TURNS, pause_s=0.2)
    assert [orjson.dumps(request.body) for request in trace] == [orjson.dumps(request.body) for request in again]
    other = identity_traces.generate(8, TURNS)
    assert orjson.dumps(trace[0].body) != orjson.dumps(other[0].body)


def test_a_large_trace_has_every_kind_of_conversation_without_ids() -> None:
    trace = identity_traces.generate(1, 4_000)
    assert len(trace) >= 4_000
    steps, kinds = {request.step for request in trace}, {request.trace for request in trace}
    assert steps >= {*identity_report.SUMMARISED, *identity_report.FIRST_AGAIN, "an edited message"}
    assert kinds >= {"unrelated clients, same first reply", "sub-agents, same first message", "clock", "billing line"}
    assert kinds >= {"Qwen Code", "Qwen Code, memory", "aider", "LangGraph, trimmed", "smolagents", "pi", "LlamaIndex"}
    assert kinds >= {"Vercel AI SDK", "Open WebUI", "Cline", "goose", "Continue", "Claude Code, no headers", "Zed"}
    assert {request.client for request in trace} == {client.name for client in CLIENTS}
    assert {key for request in trace for key in request.body} == {"model", "seed", "stream", "messages", "tools"}


def test_a_request_comes_after_the_one_it_continues(trace: list[Request]) -> None:
    place = {request.number: at for at, request in enumerate(trace)}
    assert all(place[before.number] < place[request.number] for request in trace for before in request.after)
    continuing = [request for request in trace if request.relation != "new"]
    assert all(request.after for request in continuing)


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_clients_send_back_what_they_got_in_their_own_words(client: Client) -> None:
    got = scripted_upstream.reply(scripted_upstream.seed_of(Kind.TOOLS, 3))
    (sent,) = client.prepare([client.store(got)])
    assert sent["role"] == "assistant"
    assert [call["id"] for call in sent["tool_calls"]] == [call["id"] for call in got["tool_calls"]]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", [Kind.TEXT, Kind.TOOL, Kind.TOOLS, Kind.THINKING, Kind.THINKING_TOOL])
def test_the_engine_says_what_the_trace_expects(kind: Kind, *, stream: bool) -> None:
    seed = scripted_upstream.seed_of(kind, 11)
    answer = scripted_upstream.answer(orjson.dumps({"seed": seed, "stream": stream}))
    chunks = [line for line in answer.partition(b"\r\n\r\n")[2].split(b"\r\n") if line[:1] in b"{d" and line != b"d"]
    read = ChatDialect().reply(chunks, streamed=stream)
    assert not read.error
    assert read.message is not None
    assert {k: v or None for k, v in read.message.items()} == scripted_upstream.reply(seed)


# --- the gateway


def test_conversations_without_ids_are_recognised(trace: list[Request], tmp_path: Path) -> None:
    with (
        contenders.upstream(tmp_path, "loadtests.scripted_upstream") as engine,
        contenders.gateway(tmp_path, engine) as ours,
    ):
        replayed = asyncio.run(replay(ours.port, trace))
        fetched = fetch_sessions(ours.port, replayed)
    verdicts = identity_score.judge(
        replayed.observations, {name: session["lineage"] for name, session in fetched.items()}
    )
    # In so few turns one that nobody can know would decide.
    score = Score.of([v for v in verdicts if v.request.trace not in _UNKNOWABLE])
    missed = identity_score.misses(verdicts)
    assert len(verdicts) > 0.95 * TURNS
    assert score.precision >= identity_report.PRECISION, missed
    assert score.recall >= identity_report.RECALL, missed
    assert score.forks_recognised == score.forks, missed
    assert score.separate == score.new, missed
    hits = identity_cache.by_trace(
        replayed.observations, {name: session["lineage"] for name, session in fetched.items()}
    )
    below = {trace: h for trace, h in hits.items() if h.gateway < h.alone and trace not in _UNKNOWABLE}
    assert not below
