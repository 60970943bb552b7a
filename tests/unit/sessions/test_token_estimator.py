"""The estimator: what is new is estimated, what is known is not, and it learns from what the engine counts."""

from pathlib import Path
from typing import Any

import pytest

from gateway.errors import StartError
from gateway.sessions.token_estimator import Estimator, find, hub_folder, unseen
from gateway.sessions.tokenizer import read
from tests.support.gateway_process import ROOT

pytestmark = pytest.mark.local

MODEL = "m"
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}


def u(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def a(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.fixture
def estimator(demo_folder: Path) -> Estimator:
    """One that knows the demo model's tokenizer."""
    made = Estimator()
    made.load_tokenizer(MODEL, str(demo_folder))
    return made


def test_only_what_is_behind_the_last_reply_is_estimated(estimator: Estimator) -> None:
    history = [u(TEXT), a(TEXT)]
    assert unseen([*history, u("x"), u("y")]) == [u("x"), u("y")]
    ahead = estimator.estimate_next_turn(MODEL, 5000, [*history, u("And then?")], {"tools": [TOOL]})
    assert (ahead.known, ahead.messages, ahead.framed) == (5000, 1, False)
    assert ahead.tokens == 5000 + ahead.new < 5020
    for counted, messages in ((0, [*history, u("x")]), (5000, [u("x")])):
        first = estimator.estimate_next_turn(MODEL, counted, messages, {"tools": [TOOL]})
        assert (first.known, first.messages, first.framed) == (0, len(messages), True)


def test_the_text_of_every_kind_of_message_counts_and_reasoning_does_not(
    demo_folder: Path, estimator: Estimator
) -> None:
    count = read(demo_folder / "tokenizer.json").count
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        u("one"),
        u([{"type": "text", "text": "two"}, {"type": "image_url", "image_url": {"url": "data:..."}}]),
        a(None, tool_calls=[call], reasoning="hidden " * 99),
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
        {"role": "user"},
        a("", tool_calls=["odd", {"function": "odd"}, None]),
    ]
    texts = ["one", "two", "get_weather", '{"city": "Oslo"}', "rain"]
    estimate = estimator.estimate(MODEL, messages, {})
    assert estimate.text == sum(map(count, texts))
    assert estimate.size == sum(map(len, texts))


def test_a_text_has_nothing_around_it_and_token_ids_are_counted(demo_folder: Path, estimator: Estimator) -> None:
    count = read(demo_folder / "tokenizer.json").count
    assert estimator.estimate_next_turn(MODEL, 9, [{"role": "text", "content": TEXT[:999]}], {}).tokens == count(
        TEXT[:999]
    )
    assert estimator.estimate_next_turn(MODEL, 9, [{"role": "tokens", "content": [1, 2, 3]}], {}).tokens == 3
    assert estimator.estimate(MODEL, [{"role": ["odd"], "content": 7}], {}).text == 0


def test_a_long_text_is_scaled_up_and_comes_out_near(demo_folder: Path, estimator: Estimator) -> None:
    long = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("gateway/**/*.py")))
    count = read(demo_folder / "tokenizer.json").count
    exact = count(long)
    assert abs(estimator.estimate(MODEL, [u(long)], {}).text - exact) / exact < 0.1
    cut = 16 * 1024  # as much is encoded
    assert estimator.estimate(MODEL, [u(long[:cut])], {}).text == count(long[:cut])
    assert estimator.estimate(MODEL, [u(long[:cut]), u(long[cut:])], {}).text > 0


def test_what_a_template_adds_to_a_message_is_learned(estimator: Estimator) -> None:
    known = 100
    for _ in range(50):
        estimate = estimator.estimate(MODEL, [u("hi"), u("there")], {}, known)
        estimator.observe(MODEL, estimate, known + estimate.text + 14)
    assert estimator.estimate(MODEL, [u("hi"), u("there")], {}, known).new == estimate.text + 14
    report = estimator.report()[MODEL]
    assert (report["source"], report["exact"], report["prompts"]) == ("tokenizer", True, 50)
    assert report["tokens_around_a_message"] == pytest.approx(7, abs=0.1)
    assert report["p95_error"] < 0.01


def test_the_bytes_of_a_token_are_learned_where_there_is_no_tokenizer() -> None:
    estimator = Estimator()
    estimator.load_tokenizer(MODEL, "nobody/nothing")
    assert estimator.estimate(MODEL, [u("x" * 400)], {}).text == 100
    for _ in range(50):
        estimate = estimator.estimate(MODEL, [u("é" * 400)], {}, 10)
        estimator.observe(MODEL, estimate, 10 + 4 + 400)
    assert estimator.estimate(MODEL, [u("é" * 400)], {}).text == pytest.approx(400, abs=4)
    report = estimator.report()[MODEL]
    assert (report["source"], report["exact"]) == ("bytes_per_token", False)
    assert "no tokenizer.json of 'nobody/nothing'" in report["why"]
    assert report["bytes_per_token"] == pytest.approx(2, abs=0.05)


def test_a_count_that_tells_nothing_of_the_new_text_teaches_nothing(estimator: Estimator) -> None:
    for model in (MODEL, "unknown"):
        before = estimator.estimate(model, [u("hi " * 100)], {})
        for known, actual, frame in (
            (500, 400, {}),
            (500, 500, {}),
            (0, 0, {}),
            (0, 90_000, {}),
            (0, 150, {"tools": [TOOL]}),
        ):
            estimator.observe(model, estimator.estimate(model, [u("hi " * 100)], frame, known), actual)
        assert estimator.estimate(model, [u("hi " * 100)], {}) == before
        assert estimator.report()[model]["prompts"] == 4


def test_errors_are_relative_to_what_the_engine_counted(estimator: Estimator) -> None:
    for actual in [1000] * 19 + [2000]:
        estimate = estimator.estimate(MODEL, [], {}, known=1000)
        estimator.observe(MODEL, estimate, actual)
    report = estimator.report()[MODEL]
    assert (report["mean_error"], report["p95_error"]) == (0.025, 0)
    assert report["mean_error_of_new"] is None


@pytest.mark.parametrize(("wrong", "p95"), [(0, 0), (1, 0), (2, 0.5), (10, 0.5), (20, 0.5)])
def test_the_95th_percentile_of_the_errors_is_that(wrong: int, p95: float) -> None:
    estimator = Estimator()
    for number in range(20):
        actual = 2000 if number < wrong else 1000
        estimator.observe(MODEL, estimator.estimate(MODEL, [], {}, known=1000), actual)
    assert estimator.report()[MODEL]["p95_error"] == p95


def test_memory_is_bounded_whatever_models_are_named() -> None:
    estimator = Estimator()
    for number in range(1000):
        model = f"m{number}"
        estimator.observe(model, estimator.estimate(model, [u("x")], {}), 9)
    assert len(estimator.report()) <= 64


def test_a_tokenizer_named_by_hand_is_taken_or_stops_the_start(demo_folder: Path, tmp_path: Path) -> None:
    estimator = Estimator(file=demo_folder / "tokenizer.json")
    estimator.check()
    estimator.load_tokenizer(MODEL, "nobody/nothing")
    assert estimator.report()[MODEL]["source"] == "tokenizer"
    for content in (None, "{}"):
        path = tmp_path / "tokenizer.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(StartError, match="tokenizer_file"):
            Estimator(file=path).check()
    Estimator().check()


def test_a_tokenizer_is_found_in_the_models_directory_and_in_the_hub_cache(demo_folder: Path, tmp_path: Path) -> None:
    assert find(str(demo_folder)) == demo_folder / "tokenizer.json"
    assert find(demo_folder.name, (tmp_path, demo_folder.parent)) == demo_folder / "tokenizer.json"
    assert find(str(tmp_path), hub=tmp_path) is None
    assert find("org/name", hub=tmp_path) is None
    cached = tmp_path / "models--org--name"
    for revision in ("aaa", "bbb"):
        (cached / "snapshots" / revision).mkdir(parents=True)
        (cached / "snapshots" / revision / "tokenizer.json").write_text("{}")
    assert find("org/name", hub=tmp_path) is None  # which of the two is served?
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("bbb\n")
    assert find("org/name", hub=tmp_path) == cached / "snapshots" / "bbb" / "tokenizer.json"
    for odd in ("../org/name", "org/../../name", "/", ""):
        assert find(odd, hub=tmp_path) in (None, Path(odd) / "tokenizer.json")


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({}, str(Path("~/.cache/huggingface/hub").expanduser())),
    ],
)
def test_the_hub_cache_is_where_the_environment_says(environment: dict[str, str], folder: str) -> None:
    assert str(hub_folder(environment)) == folder
