"""What JSON has to be: a field that is not is named with its value and with what it has to be; nothing is converted."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, Field, model_validator

from teacher_cache.fields import NOT_NULL, Count, FieldError, OpenFields, Sha256, StrictFields, check_fields, shorten


def refuse(text: str) -> str:
    raise ValueError("none is good enough")


class Inner(OpenFields):
    share: Annotated[float, Field(gt=0, le=1)]
    names: list[Annotated[str, Field(max_length=5)]] = Field(default_factory=list, min_length=1, max_length=3)


class Outer(StrictFields):
    count: Count
    below: Annotated[int, Field(lt=10)] = 0
    inner: Inner | None = None
    by_name: dict[Annotated[str, Field(max_length=5)], Inner] = Field(default_factory=dict)
    kind: Literal["one", "other"] = "one"
    switch: bool = False
    digest: Sha256 | None = None
    pair: Annotated[tuple[int, str], Field(strict=False)] | None = None
    own: Annotated[str, AfterValidator(refuse)] = ""
    lacking: Annotated[Inner | None, NOT_NULL] = None

    @model_validator(mode="after")
    def _check(self) -> Outer:
        if self.count == 13:
            raise ValueError("13 of them bring bad luck")
        return self


@pytest.mark.parametrize(
    "fields, said",
    [
        ({}, "the field 'count' is missing"),
        ({"count": "3"}, "the field 'count' is '3': it must be a whole number"),
        ({"count": True}, "the field 'count' is True: it must be a whole number"),
        ({"count": 3.0}, "the field 'count' is 3.0: it must be a whole number"),
        ({"count": None}, "the field 'count' is None: it must be a whole number"),
        ({"count": -1}, "the field 'count' is -1: it must be a number of at least 0"),
        ({"count": 2**60}, "it must be a number of at most 2.81475e+14"),
        ({"count": 10**400}, "the field 'count' is 1000000000"),
        ({"count": 1, "below": 10}, "the field 'below' is 10: it must be a number below 10"),
        ({"count": 1, "unknown": [1]}, "the field 'unknown' is [1]: no field of that name is known"),
        ({"count": 1, "inner": []}, "the field 'inner' is []: it must be an object"),
        ({"count": 1, "inner": {"share": "x"}}, "the field 'inner.share' is 'x': it must be a number"),
        ({"count": 1, "inner": {"share": 0}}, "the field 'inner.share' is 0: it must be a number above 0"),
        ({"count": 1, "inner": {"share": float("nan")}}, "it must be a finite number"),
        ({"count": 1, "inner": {"share": float("inf")}}, "the field 'inner.share' is inf: it must be a"),
        ({"count": 1, "inner": {"share": 10**400}}, "the field 'inner.share' is 1000"),
        ({"count": 1, "inner": {"share": 1, "names": {}}}, "the field 'inner.names' is {}: it must be a list"),
        ({"count": 1, "inner": {"share": 1, "names": []}}, "it must be something with at least 1 entries"),
        ({"count": 1, "inner": {"share": 1, "names": ["a"] * 4}}, "it must be something with at most 3 entries"),
        ({"count": 1, "inner": {"share": 1, "names": ["a", 3]}}, "'inner.names.1' is 3: it must be text"),
        ({"count": 1, "inner": {"share": 1, "names": ["abcdef"]}}, "it must be text of at most 5 letters"),
        ({"count": 1, "by_name": []}, "the field 'by_name' is []: it must be an object"),
        ({"count": 1, "by_name": {"a": {"share": 2}}}, "the field 'by_name.a.share' is 2: it must be a number of at"),
        ({"count": 1, "by_name": {"abcdef": {"share": 1}}}, "the field 'by_name.abcdef' is 'abcdef': it must be text"),
        ({"count": 1, "kind": "none"}, "the field 'kind' is 'none': it must be 'one' or 'other'"),
        ({"count": 1, "switch": 1}, "the field 'switch' is 1: it must be true or false"),
        ({"count": 1, "digest": "x"}, "the field 'digest' is 'x': it must be text of the form ^[0-9a-f]{64}$"),
        ({"count": 1, "pair": "xy"}, "the field 'pair' is 'xy': it must be a list"),
        ({"count": 1, "pair": [1]}, "the field 'pair.1' is missing"),
        ({"count": 1, "pair": [True, "x"]}, "the field 'pair.0' is True: it must be a whole number"),
        ({"count": 1, "own": "x"}, "the field 'own' is 'x': none is good enough"),
        ({"count": 1, "lacking": None}, "the field 'lacking' is None: it may be left out, but not be null"),
        ({"count": 13}, "13 of them bring bad luck"),
        ([], "it must be an object"),
    ],
)
def test_what_is_wrong_is_said(fields: Any, said: str) -> None:
    with pytest.raises(FieldError) as caught:
        check_fields(Outer, fields)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 250


def test_what_is_right_comes_back() -> None:
    found = check_fields(Outer, {"count": 3, "inner": {"share": 1, "of tomorrow": [None]}, "pair": [1, "x"]})
    assert (found.count, found.pair, found.lacking) == (3, (1, "x"), None)
    assert found.inner is not None and isinstance(found.inner.share, float) and found.inner.names == []


def test_an_error_says_where_and_what() -> None:
    with pytest.raises(FieldError) as caught:
        check_fields(Outer, {"count": 1, "by_name": {"a": {"share": []}}})
    assert (caught.value.place, caught.value.value) == (("by_name", "a", "share"), [])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*Outer.model_fields, "share", "names"]), inner),
    max_leaves=20,
)


@given(VALUES)
def test_whatever_it_is_the_answer_is_the_same_fields_or_one_message(value: Any) -> None:
    said, found = "", None
    try:
        found = check_fields(Outer, value).model_dump(exclude_unset=True)
    except FieldError as error:
        said = str(error)
    if found is None:
        assert said.isprintable() and 0 < len(said) < 400
    else:
        assert json.loads(json.dumps(found, allow_nan=False)).keys() == value.keys()


def test_long_values_are_cut() -> None:
    assert shorten("x" * 100) == f"'{'x' * 59}…" and shorten([1]) == "[1]"
