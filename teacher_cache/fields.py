"""What JSON that others may have written has to be: types and bounds as pydantic schemas, and one message for all.

A schema is a subclass of `StrictFields` (no field beside its own) or `OpenFields` (others are left alone: later
versions and other programs may add some). `check_fields` compares an object with one and names the first field that is
not as it has to be. Nothing is converted: `True` is no number, `"3"` neither, and no number is infinite. Importing it
takes a tenth of a second, so what `--help` imports does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

_SHOWN = 60
MOST_LAYERS = 4096

Layer = Annotated[int, Field(ge=0, le=MOST_LAYERS)]
Count = Annotated[int, Field(ge=0, le=2**48)]
Text = Annotated[str, Field(max_length=2**20)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _refuse_null(value: object) -> object:
    if value is None:
        raise ValueError("it may be left out, but not be null")
    return value


NOT_NULL = BeforeValidator(_refuse_null)
"""For a field that is None where it is left out, and must not be null where it is there."""


class StrictFields(BaseModel):
    """No field is converted, left out or added, and no number is infinite or none at all."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class OpenFields(StrictFields):
    """As `StrictFields`, but fields of other names are left alone."""

    model_config = ConfigDict(extra="ignore")


SchemaT = TypeVar("SchemaT", bound=StrictFields)


class FieldError(ValueError):
    """A field that is not what it has to be: `place` are the keys that lead to its `value`; `problem` says it all."""

    def __init__(self, place: tuple[int | str, ...], value: object, problem: str) -> None:
        self.place, self.value = place, value
        name = shorten(".".join(map(str, place)))
        super().__init__(f"the field {name} {problem}" if place else problem)


def check_fields(schema: type[SchemaT], fields: object) -> SchemaT:
    """The fields by name, once every one of them has the type and the bounds that the schema asks for.

    Raises:
        FieldError: one has not; the message names it, its value, and what it has to be.
    """
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = tuple(part for part in first["loc"] if part != "[key]")
    kind, value = first["type"], first["input"]
    if kind == "missing":
        raise FieldError(place, None, "is missing")
    said = _explain(kind, first["msg"], first.get("ctx", {}))
    raise FieldError(place, value, f"is {shorten(value)}: {said}" if place else said)


def _explain(kind: str, message: str, context: Mapping[str, Any]) -> str:
    if kind == "value_error":  # of a check of our own, which says all of it
        return str(context["error"])
    if kind == "extra_forbidden":
        return "no field of that name is known"
    return f"it must be {_EXPECTED[kind](context)}" if kind in _EXPECTED else message


_EXPECTED: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "int_type": lambda _: "a whole number",
    "float_type": lambda _: "a number",
    "finite_number": lambda _: "a finite number",
    "string_type": lambda _: "text",
    "bool_type": lambda _: "true or false",
    "list_type": lambda _: "a list",
    "tuple_type": lambda _: "a list",
    "dict_type": lambda _: "an object",
    "model_type": lambda _: "an object",
    "greater_than": lambda limits: f"a number above {limits['gt']:g}",
    "greater_than_equal": lambda limits: f"a number of at least {limits['ge']:g}",
    "less_than": lambda limits: f"a number below {limits['lt']:g}",
    "less_than_equal": lambda limits: f"a number of at most {limits['le']:g}",
    "literal_error": lambda limits: str(limits["expected"]),
    "string_pattern_mismatch": lambda limits: f"text of the form {limits['pattern']}",
    "string_too_long": lambda limits: f"text of at most {limits['max_length']} letters",
    "too_short": lambda limits: f"something with at least {limits['min_length']} entries",
    "too_long": lambda limits: f"something with at most {limits['max_length']} entries",
}
"""By the kinds of error that pydantic knows."""


def shorten(value: object) -> str:
    """A value as Python writes it, in one short line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
