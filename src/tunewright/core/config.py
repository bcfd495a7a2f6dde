"""The base of every ``Config``: frozen, unknown keys refused, problems told in the user's words."""

from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from tunewright.core.errors import Problem, nearest


class Config(BaseModel):
    """A frozen set of named options; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def problems(error: ValidationError, schema: type[BaseModel], prefix: str = "") -> list[Problem]:
    """One problem for each thing pydantic found, with a dotted place and a fix."""
    return [_problem(found, schema, prefix) for found in error.errors()]


def _problem(found: Any, schema: type[BaseModel], prefix: str) -> Problem:
    loc = [str(part) for part in found["loc"]]
    where = ".".join([prefix, *loc] if prefix else loc) or "recipe"
    if found["type"] == "extra_forbidden":
        siblings = _fields_at(schema, loc[:-1])
        return Problem(where, "there is no such option", nearest(loc[-1], siblings))
    if found["type"] == "missing":
        return Problem(where, "is required and was not given", f"add `{loc[-1]}:`")
    return Problem(where, f"{_lower(found['msg'])}, found {found['input']!r}")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, be it one or a tuple of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)


def _fields_at(schema: type[BaseModel], loc: Iterable[str]) -> list[str]:
    """The options known at a place, following the models along the way."""
    for part in loc:
        if part.isdigit():
            continue
        field = schema.model_fields.get(part)
        inner = _model_in(field.annotation) if field else None
        if inner is None:
            return list(schema.model_fields)
        schema = inner
    return list(schema.model_fields)
