"""Parts of a JSON text are found where a parser finds them, and what has too many is refused before it is parsed."""

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.validation.json_limits import TooDeep, TooMany
from gateway.validation.json_scan import BadJson, Budget, elements, members

few = settings(max_examples=60)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text()
    | st.sampled_from(['"', "\\", '\\"', "[{,}]:"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
spaces = st.sampled_from([0, orjson.OPT_INDENT_2, orjson.OPT_APPEND_NEWLINE])


def plenty() -> Budget:
    """More than any value here has."""
    return Budget(1000, 10**6, 10**6)


@few
@given(st.lists(values), spaces)
def test_the_elements_of_an_array_are_its_values(items: list[object], option: int) -> None:
    data = memoryview(orjson.dumps(items, option=option))
    assert [orjson.loads(part) for part in elements(data, plenty())] == items


@few
@given(st.dictionaries(st.text(), values), spaces)
def test_the_members_of_an_object_are_its_names_and_values(item: dict[str, object], option: int) -> None:
    data = memoryview(orjson.dumps(item, option=option))
    found = {orjson.loads(b'"%s"' % name): orjson.loads(part) for name, part in members(data, plenty())}
    assert found == item


@few
@given(st.lists(values).map(orjson.dumps), st.integers(0, 60), st.sampled_from([b"", b'"', b"[", b"}", b"\\", b","]))
def test_an_altered_text_means_the_same_here_as_to_the_parser(data: bytes, at: int, sign: bytes) -> None:
    altered = data[:at] + sign + data[at + 1 :]
    try:
        whole = orjson.loads(altered)
    except ValueError:
        whole = None
    try:
        parts = [orjson.loads(part) for part in elements(memoryview(altered), plenty())]
    except ValueError:
        parts = None
    assert parts == (whole if isinstance(whole, list) else None)


@pytest.mark.parametrize("length", range(2**20 - 6, 2**20 + 2))
def test_a_string_may_end_or_escape_wherever_a_piece_does(length: int) -> None:
    items = ["x" * length + '\\"\n,]' * 3, 1]
    assert [orjson.loads(part) for part in elements(memoryview(orjson.dumps(items)), plenty())] == items


@pytest.mark.parametrize("text", [b"", b" ", b"1", b"{}", b"[", b"[1", b"[1}", b"[1]2", b'["a', b'["a\\', b"[1]]"])
def test_a_value_that_is_not_an_array_is_an_error(text: bytes) -> None:
    with pytest.raises(BadJson):
        list(elements(memoryview(text), plenty()))


@pytest.mark.parametrize("text", [b"[]", b'{"a"}', b"{1:2}", b'{"a":1', b'{"a" 1}', b"{,}"])
def test_a_value_that_is_not_an_object_is_an_error(text: bytes) -> None:
    with pytest.raises(BadJson):
        list(members(memoryview(text), plenty()))


def test_depth_counts_from_the_outermost_bracket() -> None:
    fits = memoryview(b"[[[1]],2]")
    assert len(list(elements(fits, Budget(3, 10, 10)))) == 2
    with pytest.raises(TooDeep, match="deeper than 2"):
        list(elements(fits, Budget(2, 10, 10)))


@pytest.mark.parametrize(("containers", "commas"), [(3, 3), (4, 2)])
def test_containers_and_commas_are_counted_over_the_whole_text(containers: int, commas: int) -> None:
    text = memoryview(b'[[1,"[,"],{},{"a":2,"b":3}]')
    with pytest.raises(TooMany):
        list(elements(text, Budget(9, containers, commas)))
    assert len(list(elements(text, Budget(9, 4, 4)))) == 3


def test_nested_brackets_are_refused_at_the_first_that_is_too_deep() -> None:
    budget = Budget(100, 10**9, 10**9)
    with pytest.raises(TooDeep):
        list(elements(memoryview(b"[" * 10_000_000), budget))
    assert budget.containers > 10**9 - 200
