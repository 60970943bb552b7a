"""Which objects of a window cannot have the right size."""

import pytest

from gateway.engines.client import Model
from gateway.kv.keys import object_keys
from gateway.records import PinnedObject
from gateway.windows.ensure_stored import Plan, wrong_sizes

LAYOUT = frozenset({100})


def found_wrong(sizes: list[int], layout: frozenset[int] = LAYOUT, world_size: int = 1) -> list[int]:
    """The places of the objects of these sizes, in the plan's order, that are found to be wrong; 0 is missing."""
    ids = range(len(sizes) // world_size * 16)
    keys = tuple(object_keys("m", ids, 16, world_size, "salt"))
    plan = Plan(Model("m", "m", 8192, "f"), "salt", ids, 16, world_size, keys, layout)
    pinned = [PinnedObject(str(key), "s3", size, b"") for key, size in zip(keys, sizes, strict=True) if size]
    return [keys.index(key) for key in wrong_sizes(plan, pinned)]


@pytest.mark.parametrize(
    ("sizes", "wrong"),
    [
        ([100, 100, 100], []),
        ([100, 40, 100], [1]),
        ([100, 140, 100], [1]),
        ([40, 40, 100], [0, 1]),  # the engine's layout says which is right
        ([129, 129, 50], [2]),  # a serde has changed all sizes
        ([129, 50], [1]),
        ([40, 40, 40], []),  # a serde that compresses looks like that
        ([0, 100, 40], [2]),
        ([], []),
    ],
)
def test_size_that_differs_is_wrong(sizes: list[int], wrong: list[int]) -> None:
    assert found_wrong(sizes) == wrong


def test_each_rank_has_its_own_size() -> None:
    assert found_wrong([100, 80, 100, 80, 100, 70], world_size=2) == [5]


def test_without_a_layout_most_are_right() -> None:
    assert found_wrong([40, 100, 40], frozenset()) == [1]
