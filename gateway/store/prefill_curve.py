"""How long an engine takes to compute the KV of a prompt, learned from prompts that it computed. Pure arithmetic.

A prompt token costs a constant for the linear layers, and attends to every token before it. So computing `computed`
tokens after `cached` ones takes

    per_request + per_token * computed + per_pair * (computed * cached + computed**2 / 2)

seconds, and what is saved by finding `cached` tokens, the difference to computing all of them, does not depend on what
follows: `per_token * cached + per_pair * cached**2 / 2`.

A busy engine takes longer, hardly ever less. Samples are grouped by size, each group is represented by one of its
quicker samples, and groups weigh the same whatever there are more of, short prompts or long ones.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

MIN_SAMPLES = 3  # before anything is estimated
MIN_COMPUTED = 16  # tokens of a sample; a shorter prompt says nothing about what a token costs
KEPT_PER_CLASS = 16  # samples
_MAX_CACHED_SHARE = 0.25  # of the computed tokens: loading KV takes time too
_QUICK = 1 / 3  # the rank of the sample that represents its group: quick, but not an outlier
_FULL_WEIGHT = 4  # samples
# Of `per_pair` in `per_token`. Small models, where it is largest, have 1/3,000 by their floating-point operations, and
# 1/2,500 was measured on a CPU: without a bound, noise in short prompts would be taken for it.
_MAX_PAIR_SHARE = 1 / 1000
# How far beyond the longest prompt estimates go, by the least ratio of the longest to the shortest: the form is known,
# but its three coefficients can be told apart only where prompts differ in length.
_REACH = ((4.0, 4.0), (2.0, 2.0), (1.0, 1.25))
_WIDE = 2.0
_ERRORS = 50  # predictions that the error is a median of
_EQUAL = 1e-9
# So many samples in a row that took so much less, or more, than the older ones predict: the engine is another one. A
# busy engine is slower too, so that takes more samples.
_QUICKER, _SLOWER = (5, 1 / 1.5), (8, 1.5)
_AS_USUAL = 1.2
_KNOWN_SIZE = 1.25  # a prediction is judged up to so much more than the longest of the older samples


class Sample(NamedTuple):
    """A prompt of which `computed` tokens were computed, after `cached` ones, and the seconds to the first token.

    `predicted` is what the curve said before it was learned from, None if the curve was not known yet.
    """

    computed: int
    cached: int
    seconds: float
    predicted: float | None = None

    @property
    def size_class(self) -> int:
        """Its group: two for each doubling."""
        return int(2 * math.log2(self.computed))

    @property
    def pairs(self) -> float:
        """Pairs of a computed token and one before it."""
        return self.computed * self.cached + self.computed**2 / 2


@dataclass(frozen=True, slots=True)
class PrefillCurve:
    """The learned coefficients, in seconds; estimates are for up to `reach` tokens."""

    per_request: float
    per_token: float
    per_pair: float
    reach: int

    def seconds(self, computed: int, cached: int = 0) -> float:
        """How long the engine takes to compute so many tokens after cached ones."""
        sample = Sample(computed, cached, 0.0)
        return self.per_request + self.per_token * computed + self.per_pair * sample.pairs

    def saved(self, tokens: int, squares: int) -> float:
        """How long it would have taken to compute prefixes that have so many tokens; `squares` adds their squares."""
        return self.per_token * tokens + self.per_pair * squares / 2


def is_cold(computed: int, cached: int) -> bool:
    """Whether a prompt can be learned from: enough of it was computed, and little of it loaded."""
    return computed >= MIN_COMPUTED and cached <= computed * _MAX_CACHED_SHARE


def fit(samples: Sequence[Sample]) -> PrefillCurve | None:
    """Learn a curve; None from too few samples. As long as prompts hardly differ in length, it is a line."""
    if len(samples) < MIN_SAMPLES:
        return None
    chosen = _representatives(samples)
    sizes = [sample.computed for sample, _ in chosen]
    spread = max(sizes) / min(sizes)
    rows = [_row(sample, math.sqrt(weight)) for sample, weight in chosen]
    per_token, per_request, curved = _least_squares(rows, 1 if spread < _WIDE else 3)
    reach = max(sizes) * next(reach for least, reach in _REACH if spread >= least)
    return PrefillCurve(per_request, per_token + curved, curved * _MAX_PAIR_SHARE, int(reach))


def _representatives(samples: Iterable[Sample]) -> list[tuple[Sample, float]]:
    """One of the quicker samples of each size, and its weight."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.size_class, []).append(sample)
    ranked = [sorted(group, key=lambda s: s.seconds / s.computed) for group in groups.values()]
    return [(g[int((len(g) - 1) * _QUICK)], min(len(g), _FULL_WEIGHT) / _FULL_WEIGHT) for g in ranked]


def _row(sample: Sample, weight: float) -> tuple[float, float, float, float]:
    """What the coefficients are multiplied by, and what that should give; errors count relative to the sample.

    The third bends the line, at most to `_MAX_PAIR_SHARE`.
    """
    scale, computed = weight / sample.seconds, float(sample.computed)
    return scale * computed, scale, scale * (computed + _MAX_PAIR_SHARE * sample.pairs), weight


def _least_squares(rows: Sequence[Sequence[float]], count: int) -> list[float]:
    """The best coefficients that are not negative, of the first `count` columns; the others are 0."""
    products = [[sum(row[i] * row[j] for row in rows) for j in range(4)] for i in range(4)]
    best, least = [0.0, 0.0, 0.0], math.inf
    for columns in (c for size in range(1, count + 1) for c in combinations(range(count), size)):
        solution = _solve([[products[i][j] for j in (*columns, 3)] for i in columns])
        if solution is None or min(solution) < 0:
            continue
        # At the minimum the squared errors are those of the targets, less what the solution explains.
        error = products[3][3] - sum(value * products[c][3] for c, value in zip(columns, solution, strict=True))
        if error < least - _EQUAL * products[3][3]:  # of two equal ones the simpler
            best, least = [dict(zip(columns, solution, strict=True)).get(c, 0.0) for c in range(3)], error
    return best


def _solve(matrix: list[list[float]]) -> list[float] | None:
    """Solve linear equations with a positive definite matrix by elimination; None if it is not."""
    diagonal = [row[i] for i, row in enumerate(matrix)]
    for i, size in enumerate(diagonal):
        pivot = matrix[i][i]
        if pivot <= _EQUAL * size:
            return None
        for j in range(len(matrix)):
            if j != i:
                factor = matrix[j][i] / pivot
                matrix[j] = [a - factor * b for a, b in zip(matrix[j], matrix[i], strict=True)]
    return [row[-1] / row[i] for i, row in enumerate(matrix)]


def error_share(samples: Sequence[Sample]) -> float | None:
    """The median relative error of the last predictions, None if there are too few; `samples` are oldest first."""
    known = [(s.predicted, s.seconds) for s in samples if s.predicted is not None][-_ERRORS:]
    errors = sorted(abs(predicted - seconds) / seconds for predicted, seconds in known)
    if len(errors) < MIN_SAMPLES:
        return None
    middle = len(errors) // 2
    return round(errors[middle] if len(errors) % 2 else (errors[middle - 1] + errors[middle]) / 2, 3)


def since_change(samples: Sequence[Sample]) -> int:
    """How many of the last samples are of an engine that became quicker or slower; 0 if it is as it was.

    `samples` are oldest first.
    """
    if all(s.predicted and 1 / _AS_USUAL < s.seconds / s.predicted < _AS_USUAL for s in samples[-_SLOWER[0] :]):
        return 0
    for count, ratio in (_QUICKER, _SLOWER):
        older, last = samples[:-count], samples[-count:]
        curve = fit(older)
        if curve is None or max(s.computed for s in last) > _KNOWN_SIZE * max(s.computed for s in older):
            continue
        shares = [s.seconds / max(curve.seconds(s.computed, s.cached), 1e-9) for s in last]
        if max(shares) < ratio < 1 or min(shares) > ratio > 1:
            return count
    return 0
