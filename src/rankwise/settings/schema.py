"""What may be named in a configuration: methods, tasks and runners with their options, checked or as a JSON schema."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rankwise.errors import InputError, nearest
from rankwise.named import defaults, options_of
from rankwise.settings.experiment import Published, Tune
from rankwise.settings.run import NAMED, SCALED, RunConfig, explain
from rankwise.settings.yaml_files import quoted


@dataclasses.dataclass(frozen=True)
class Schema:
    """What may be named in a configuration: methods and tasks by name, frozen dataclasses whose fields are options."""

    methods: Mapping[str, type]
    tasks: Mapping[str, type]


def json_schema(schema: Schema) -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors: one run or an experiment."""
    result = RunConfig.model_json_schema()
    properties = result["properties"]
    for key, known, words in (("method", schema.methods, ["name"]), ("task", schema.tasks, ["name", "type"])):
        parts = [_part_schema(name, kind, words) for name, kind in sorted(known.items())]
        properties[key] = {"oneOf": [{"enum": sorted(known)}, *parts]}
    properties["method"]["default"] = {"name": "lora"}
    properties["vary"] = {
        "type": "object",
        "description": "axes of an experiment: dotted key -> list of values",
        "additionalProperties": {"type": "array", "minItems": 1},
    }
    properties["chain"] = {
        "type": "array",
        "description": "stages, each of settings; a run begins with what the run of the stage before has trained",
        "items": {"type": "object", "minProperties": 1},
        "minItems": 1,
    }
    properties["tune"] = Tune.model_json_schema()
    properties["report"] = {
        "type": "object",
        "properties": {
            "title": {"type": "string"},
            "text": {"type": "string"},
            "reference": {
                "description": "what the other methods are measured against: a method, or its name with some options",
                "type": ["string", "object"],
            },
        },
        "additionalProperties": False,
    }
    for name in SCALED:
        properties[name] = {
            "type": "object",
            "description": f"settings that `scale: {name}` takes before those of the command line: dotted key -> value",
        }
    properties["published"] = Published.model_json_schema()
    result["anyOf"] = [{"required": ["task"]}, {"required": ["vary"]}]
    result.pop("required", None)
    result["title"] = "rankwise configuration"
    return result


def _part_schema(name: str, kind: type, words: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of one method or task with its options; its name stands at one of `words`."""
    options: dict[str, Any] = {word: {"const": name} for word in words}
    required = []
    for field, hint in options_of(kind, ranges=True).items():
        options[field.name] = TypeAdapter(hint).json_schema()
        if field.name in defaults(kind):
            options[field.name]["default"] = defaults(kind)[field.name]
        else:
            required.append(field.name)
    return {
        "type": "object",
        "description": (kind.__doc__ or "").strip().partition("\n")[0],
        "properties": options,
        "required": required,
        "oneOf": [{"required": [word]} for word in words],
        "additionalProperties": False,
    }


@functools.cache
def _adapters(kind: type) -> dict[str, TypeAdapter[Any]]:
    """What checks each option of a method or a task; an experiment asks for them once per run and method."""
    return {field.name: TypeAdapter(hint) for field, hint in options_of(kind).items()}


def check_options(
    key: str, known: Mapping[str, type], given: Mapping[str, Any], fitted: bool = False
) -> dict[str, Any]:
    """`given`, the name and options of a method or a task, checked and with all defaults filled in.

    Where a budget is to be met (`fitted`) the options that say how much trains stay open, unless they are given.
    """
    name = given.get("name")
    if not isinstance(name, str):
        raise InputError(f"{key}: needs a name, as in `{key}: {{name: {NAMED[key]}}}`")
    if name not in known:
        raise InputError(
            f"{key} = {quoted(name)}: no such {key}{nearest(name, known)}; known: {', '.join(sorted(known))}"
        )
    kind = known[name]
    options = _adapters(kind)
    values: dict[str, Any] = {}
    for option, value in given.items():
        if option == "name":
            continue
        if option not in options:
            hint = nearest(option, options) or (f"; its options: {', '.join(options)}" if options else "; it has none")
            raise InputError(f"{key}.{option}: {name} has no such option{hint}")
        try:
            values[option] = options[option].validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            raise InputError(explain(error, f"{key}.{option}")) from None
    try:
        made = kind(**values)
    except (ValueError, TypeError) as error:
        raise InputError(f"{key} {name}: {str(error).partition(chr(10))[0]}") from None
    full = {option: adapter.dump_python(getattr(made, option), mode="json") for option, adapter in options.items()}
    sizes = getattr(kind, "sizes", ()) if fitted else ()
    left_open = () if any(option in values for option in sizes) else sizes
    return {"name": name, **{option: value for option, value in full.items() if option not in left_open}}
