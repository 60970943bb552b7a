"""Policies by themselves: what each decides, how they are found, and what may be set."""

from dataclasses import replace
from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.records import WINDOW_NAME
from gateway.windows.autofreeze import rules
from gateway.windows.autofreeze.policy_runner import PolicyRunner
from gateway.windows.autofreeze.rules import Rules
from policies.contract import Observation
from policies.loader import BUILT_IN, PolicyError, build
from tests.support.fakes.policies import Exiting, Failing, Lying, Turns, Unprintable

SEEN = Observation(
    event="sweep",
    session_id="s",
    model="m",
    turn_count=1,
    token_count=100,
    covered_tokens=0,
    context_limit=1000,
    idle_s=0,
    age_s=0,
)
IDLE = {"use": "idle_timeout", "minutes": 10}
TOKENS = {"use": "token_threshold", "tokens": 500}


def reason(spec: Any, **seen: Any) -> str | None:
    """What a policy says of a session."""
    decision = build(spec, ["tests.support.fakes.policies:Turns"]).decide(replace(SEEN, **seen))
    return decision.reason if decision else None


def test_an_idle_session_is_frozen_when_its_time_is_up() -> None:
    assert reason(IDLE, idle_s=599) is None
    assert reason(IDLE, idle_s=600) == "idle for 10.0 minutes (idle timeout 10)"


def test_a_threshold_is_crossed_once_and_again_after_the_session_has_shrunk() -> None:
    assert reason(TOKENS, token_count=499) is None
    assert reason(TOKENS, token_count=500) == "500 tokens (threshold 500)"
    assert reason(TOKENS, token_count=900, covered_tokens=500) is None
    assert reason(TOKENS, token_count=501, covered_tokens=200) is not None


def test_a_share_needs_a_limit_to_be_a_share_of() -> None:
    spec = {"use": "context_share", "share": 0.5}
    assert reason(spec, token_count=500) == "50.0% of the context limit of 1000 tokens (threshold 50.0%)"
    assert reason(spec, token_count=499) is None
    assert reason(spec, token_count=900, covered_tokens=600) is None
    assert reason(spec, token_count=900, context_limit=None) is None


def test_at_shutdown_only_the_end_of_the_gateway_counts() -> None:
    assert reason({"use": "at_shutdown"}, idle_s=1) is None
    assert reason({"use": "at_shutdown"}, event="shutdown") == "the gateway was stopped"
    assert reason({"use": "at_shutdown", "minutes": 1}, event="shutdown", idle_s=61) is None


def test_combinations_of_combinations() -> None:
    both = {"use": "all_of", "policies": [IDLE, TOKENS]}
    assert reason(both, idle_s=600) is None
    assert reason(both, idle_s=600, token_count=500) == (
        "idle for 10.0 minutes (idle timeout 10) and 500 tokens (threshold 500)"
    )
    either = {"use": "any_of", "policies": [both, {"use": "tests.support.fakes.policies:Turns", "turns": 3}]}
    assert reason(either, turn_count=3) == "3 turns"
    assert reason(either) is None


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_can_be_had_by_its_import_string_too(name: str) -> None:
    given = {"tokens": 5} if name == "token_threshold" else {"policies": [IDLE]} if name.endswith("_of") else {}
    by_name, by_path = (build({"use": use, **given}, BUILT_IN.values()) for use in (name, BUILT_IN[name]))
    assert by_name == by_path


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("idle_timeout", 'policy: must be an object with "use"'),
        ({"minutes": 1}, 'must be an object with "use"'),
        ({"use": "idle_timeot"}, "unknown policy 'idle_timeot': did you mean 'idle_timeout'?"),
        ({"use": "subprocess:Popen", "args": "id"}, "unknown policy 'subprocess:Popen'"),
        ({"use": "no_such_module:X"}, "cannot import 'no_such_module': ModuleNotFoundError"),
        ({"use": "tests.support.fakes.policies:Nobody"}, "module 'tests.support.fakes.policies' has no 'Nobody'"),
        ({"use": "nonsense"}, "'nonsense' must be \"package.module:Class\""),
        ({"use": "tests.support.fakes.policies:NotOne"}, "has no method decide"),
        ({"use": "idle_timeout", "minuets": 1}, "got an unexpected keyword argument 'minuets'; it takes minutes"),
        ({"use": "token_threshold"}, "missing a required argument: 'tokens'"),
        ({"use": "idle_timeout", "minutes": 0}, "minutes must be a number, more than 0"),
        ({"use": "idle_timeout", "minutes": float("nan")}, "minutes must be a number"),
        ({"use": "token_threshold", "tokens": 1.5}, "tokens must be a whole number"),
        ({"use": "token_threshold", "tokens": True}, "tokens must be a whole number"),
        ({"use": "context_share", "share": 1.01}, "share must be a number, more than 0 and at most 1"),
        ({"use": "any_of", "policies": []}, "policies must be a list of at least one policy"),
        ({"use": "all_of", "policies": [IDLE, {"use": "x"}]}, "policy.policies[1]: unknown policy 'x'"),
    ],
)
def test_what_is_no_policy_is_refused_and_says_where(spec: Any, says: str) -> None:
    custom = [
        "no_such_module:X",
        "nonsense",
        "tests.support.fakes.policies:Nobody",
        "tests.support.fakes.policies:NotOne",
    ]
    with pytest.raises(PolicyError) as refused:
        build(spec, custom)
    assert says in str(refused.value)


def test_combinations_have_an_end() -> None:
    spec: dict[str, Any] = IDLE
    for _ in range(20):
        spec = {"use": "any_of", "policies": [spec]}
    with pytest.raises(PolicyError, match="deep"):
        build(spec)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enabled", 1), ("at_shutdown", "yes"), ("idle_timeout_minutes", 0), ("idle_timeout_minutes", -1),
        ("idle_timeout_minutes", "30"), ("idle_timeout_minutes", 1e9), ("token_threshold", 0),
        ("token_threshold", 0.75), ("token_threshold", True), ("context_share", 0), ("context_share", 1.5),
        ("context_share", float("nan")),
        ("cooldown_seconds", 0), ("cooldown_seconds", None), ("keep", 0), ("keep", 101), ("ttl_seconds", 0),
        ("policies", {}), ("policies", [{}] * 33), ("naming_pattern", "auto"), ("naming_pattern", ""),
        ("naming_pattern", None), ("naming_pattern", "{session_id}"), ("naming_pattern", "{timestamp}"),
        ("naming_pattern", "auto-{session_id}-{timestamp}-{nope}"),
        ("naming_pattern", "{session_id.__class__}-{timestamp}"), ("naming_pattern", "{session_id[0]}-{timestamp}"),
        ("naming_pattern", "{session_id!r}-{timestamp}"), ("naming_pattern", "{session_id:>99999999}-{timestamp}"),
        ("naming_pattern", "{session_id}{session_id}-{timestamp}"), ("naming_pattern", "{0}-{session_id}-{timestamp}"),
        ("naming_pattern", "my {session_id}-{timestamp}"), ("naming_pattern", "-{session_id}-{timestamp}"),
        ("naming_pattern", "{session_id}-{timestamp}\n"), ("naming_pattern", "{session_id}-{timestamp"),
        ("naming_pattern", "{{{session_id}-{timestamp}}}"), ("naming_pattern", "x" * 81 + "{session_id}{timestamp}"),
    ],
)  # fmt: skip
def test_x17_a_rule_that_does_not_fit_is_refused_and_named(field: str, value: Any) -> None:
    with pytest.raises(GatewayError, match=field) as refused:
        rules.with_changes(Rules(), {field: value})
    assert (refused.value.code, refused.value.details) == ("invalid_request", {"field": field})


def test_a_threshold_above_every_models_limit_is_refused_wherever_it_hides() -> None:
    rules.check_limits(replace(Rules(), token_threshold=1000), {"a": 10, "b": 1000})
    rules.check_limits(replace(Rules(), token_threshold=1001), {})
    with pytest.raises(GatewayError, match=r"token_threshold 1001 is above .* at most 1000"):
        rules.check_limits(replace(Rules(), token_threshold=1001), {"a": 10, "b": 1000})
    hidden = ({"use": "all_of", "policies": [IDLE, {"use": "any_of", "policies": [TOKENS]}]},)
    with pytest.raises(GatewayError, match=r"policies\[0\]\.policies\[1\]\.policies\[0\] 500 is above"):
        rules.check_limits(replace(Rules(), policies=hidden), {"a": 499})


@pytest.mark.parametrize(
    "pattern",
    ["auto-{session_id}-{timestamp}", "{timestamp}{session_id}_{turns}", "x" * 40 + "{session_id}{timestamp}"],
)
@pytest.mark.parametrize("session", ["a", "Ab:c.d:e_f-g", "s" * 128, "1" + ":" * 127])
def test_a_name_is_always_a_windows_name_with_room_for_a_number(pattern: str, session: str) -> None:
    name = rules.window_name(pattern, session, 10**9, 1.8e9)
    assert WINDOW_NAME.fullmatch(f"{name}-100")
    assert "20270115-080000" in name


@pytest.mark.anyio
async def test_a_policy_that_fails_or_lies_does_not_keep_the_others_from_deciding(caplog: Any) -> None:
    named = [("failing", Failing()), ("lying", Lying()), ("turns", Turns(1))]
    deciding = PolicyRunner()
    decisions = await deciding.decide(named, [SEEN, replace(SEEN, turn_count=0)])  # type: ignore[arg-type]
    assert [d and d.reason for d in decisions] == ["1 turns", None]
    failing, lying, turns = await deciding.opinions(named, SEEN)  # type: ignore[arg-type]
    assert failing.error == "RuntimeError: no idea what to do with s"
    assert "must return Freeze(reason) or None, not True" in lying.error
    assert (turns.decision and turns.decision.reason, turns.error) == ("1 turns", "")
    assert caplog.text.count("policy failing failed") == caplog.text.count("policy lying") == 1


@pytest.mark.anyio
async def test_a_policy_that_would_exit_keeps_nothing_from_being_decided_now_or_later() -> None:
    named = [("exiting", Exiting()), ("turns", Turns(1))]
    deciding = PolicyRunner()
    for _ in range(2):
        decisions = await deciding.decide(named, [SEEN])  # type: ignore[arg-type]
        assert [d and d.reason for d in decisions] == ["1 turns"]
    exiting, _ = await deciding.opinions(named, SEEN)  # type: ignore[arg-type]
    assert exiting.error == "SystemExit: 3"


@pytest.mark.anyio
async def test_unprintable_policy_leaves_others_deciding() -> None:
    named = [("unprintable", Unprintable()), ("turns", Turns(1))]
    runner = PolicyRunner()
    decisions = await runner.decide(named, [SEEN, replace(SEEN, turn_count=0)])  # type: ignore[arg-type]
    assert [d and d.reason for d in decisions] == ["1 turns", None]
    answered, _ = await runner.opinions(named, SEEN)  # type: ignore[arg-type]
    assert "must return Freeze(reason) or None" in answered.error
    raised, _ = await runner.opinions(named, replace(SEEN, turn_count=0))  # type: ignore[arg-type]
    assert "_Error" in raised.error


def test_at_shutdown_takes_what_was_active_up_to_the_very_minute() -> None:
    policy = build({"use": "at_shutdown", "minutes": 2})
    ending = replace(SEEN, event="shutdown")
    assert policy.decide(replace(ending, idle_s=120.0)) is not None
    assert policy.decide(replace(ending, idle_s=120.1)) is None
    assert policy.decide(replace(SEEN, event="sweep", idle_s=1.0)) is None


def test_the_replaced_systems_name_of_the_turns_is_understood() -> None:
    pattern = rules.READERS["naming_pattern"]("naming_pattern", "{session_id}-{timestamp}-{count}")
    assert rules.window_name(pattern, "s", 7, 1.8e9).endswith("-7")


def test_tags_always_hold_the_one_that_keep_goes_by() -> None:
    read = rules.READERS["tags"]
    assert read("tags", []) == ("auto",)
    assert read("tags", ["a", "auto"]) == read("tags", read("tags", ["a"])) == ("a", "auto")
