"""The prefill curve: what it learns, and when it says nothing."""

import random

import pytest

from gateway.store.prefill_curve import Sample, error_share, fit, is_cold, since_change


def _seconds(computed: int, cached: int = 0) -> float:
    """An engine of 1 ms a token, whose attention costs as much at 4,000 tokens."""
    return 0.03 + 0.001 * computed + 2.5e-7 * (computed * cached + computed**2 / 2)


def _samples(*sizes: int, slower: float = 1.0) -> list[Sample]:
    return [Sample(size, 0, _seconds(size) * slower) for size in sizes]


def test_prompts_of_all_sizes_give_the_engine_back() -> None:
    curve = fit(_samples(100, 400, 1600, 3000))
    assert curve is not None
    assert curve.reach == 12_000
    for tokens in (50, 1000, 4000, 10_000):
        assert curve.saved(tokens, tokens**2) == pytest.approx(_seconds(tokens) - 0.03, rel=0.02)
    assert curve.seconds(100, 2000) == pytest.approx(_seconds(100, 2000), rel=0.02)


def test_what_is_saved_is_the_difference_to_computing_all() -> None:
    curve = fit(_samples(100, 400, 1600, 3000))
    assert curve is not None
    whole, rest = curve.seconds(3000), curve.seconds(1000, 2000)
    assert curve.saved(2000, 2000**2) == pytest.approx(whole - rest)


def test_too_few_prompts_give_nothing() -> None:
    assert fit(_samples(100, 1600)) is None


def test_prompts_of_one_size_do_not_reach_far() -> None:
    curve = fit(_samples(1000, 1020, 1050))
    assert curve is not None
    assert curve.reach == 1312
    assert curve.saved(1000, 1000**2) == pytest.approx(_seconds(1000), rel=0.05)


def test_real_prompts_of_a_small_model() -> None:
    """The medians of loadtests/results/thaw_speed.md, 185M parameters on two cores: seconds of attention and all."""
    cold = {2400: 3.790, 7776: 20.843, 14_176: 57.915}
    for learned in ((2400, 7776, 14_176), (2400, 7776)):
        curve = fit([Sample(size, 0, cold[size]) for size in learned for _ in range(2)])
        assert curve is not None
        for size, seconds in cold.items():
            assert curve.saved(size, size**2) == pytest.approx(seconds, rel=0.25), (size, learned)


def test_a_time_that_does_not_depend_on_the_size_saves_nothing() -> None:
    """On a GPU all short prompts take as long as one step: that is no cost of a token."""
    curve = fit([Sample(size, 0, 0.03) for size in (20, 40, 80, 160)])
    assert curve is not None
    assert curve.saved(600, 600**2) == pytest.approx(0, abs=1e-3)


def test_busy_moments_do_not_count_as_long_as_some_are_quiet() -> None:
    rng = random.Random(3)
    sizes = [size for size in (100, 400, 1600, 3000) for _ in range(9)]
    noisy = [s._replace(seconds=s.seconds * rng.choice((1, 1.05, 3))) for s in _samples(*sizes)]
    curve = fit(noisy)
    assert curve is not None
    assert curve.saved(6000, 6000**2) == pytest.approx(_seconds(6000), rel=0.1)


def test_many_short_prompts_do_not_outweigh_a_few_long_ones() -> None:
    curve = fit(_samples(*[90] * 500, 700, 3000))
    assert curve is not None
    assert curve.seconds(3000) == pytest.approx(_seconds(3000), rel=0.05)


@pytest.mark.parametrize("computed", [1, 16, 17, 10**6])
def test_any_size_has_a_class(computed: int) -> None:
    assert Sample(computed, 0, 1.0).size_class >= 0


def test_prompts_that_were_loaded_or_short_are_not_learned_from() -> None:
    assert is_cold(1000, 0)
    assert is_cold(1000, 250)
    assert not is_cold(1000, 251)
    assert not is_cold(15, 0)


def test_error_is_the_median_of_predictions() -> None:
    known = [Sample(100, 0, 1.0, predicted) for predicted in (1.1, 0.8, 1.0)]
    assert error_share(known) == pytest.approx(0.1)
    assert error_share([*known[:2], Sample(100, 0, 1.0)]) is None
    assert error_share([*known, Sample(100, 0, 1.0, 2.0)]) == pytest.approx(0.15)


_USUAL = (100, 400, 1600, 3000, 200, 800, 2500)


def test_a_quicker_engine_is_noticed_after_five_prompts() -> None:
    before = _samples(*_USUAL)
    assert since_change(before) == 0
    assert since_change([*before, *_samples(*_USUAL[:4], slower=0.5)]) == 0
    assert since_change([*before, *_samples(*_USUAL[:5], slower=0.5)]) == 5


def test_a_slower_engine_is_noticed_after_eight_prompts() -> None:
    before = _samples(*_USUAL, *_USUAL)
    assert since_change([*before, *_samples(*_USUAL, slower=2)]) == 0
    assert since_change([*before, *_samples(*_USUAL, 400, slower=2)]) == 8


def test_a_quiet_prompt_among_busy_ones_is_the_same_engine() -> None:
    busy = _samples(*_USUAL, 400, slower=2)
    assert since_change([*_samples(*_USUAL, *_USUAL), *busy[:4], *_samples(800), *busy[5:]]) == 0


def test_longer_prompts_than_ever_are_no_change_of_the_engine() -> None:
    """They say that the curve was wrong there, and it is learned."""
    short = [Sample(size, 0, 0.1) for size in (50, 60, 100, 80, 120)]
    assert since_change([*short, *_samples(9000, 9000, 9000, 9000, 9000, 9000, 9000, 9000)]) == 0
