"""What is chosen by name: methods, tasks and runners. A class registers itself, and its dataclass fields are options.

>>> class LoRA(Method, name="lora"): ...
>>> Method.build({"name": "lora", "rank": 4})

Each kind has a folder. Every file in it is imported before anything is looked up, so a new file is all it takes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, TypeAdapter

from rankwise.errors import InputError, nearest

FOLDERS = {"method": "rankwise.methods", "task": "rankwise.tasks", "runner": "rankwise.sweep.runners"}
"""Kind -> the package whose files hold its classes."""
LARGEST = 2**31 - 1
"""Bound of a whole number on both sides of 0; no option counts more than that."""
FARTHEST = 1e38
"""Bound of any other number on both sides of 0: what a float32 can hold."""


class Named:
    """Base of a kind, `class Method(Named, kind="method")`, whose subclasses are found by name."""

    kind: ClassVar[str]
    known: ClassVar[dict[str, type[Any]]]
    """Name -> class, of what has been imported by now."""
    name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "", aliases: Sequence[str] = (), kind: str = "", **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if kind:
            cls.kind, cls.known = kind, {}
        if not name:
            return
        cls.name = name
        for word in (name, *aliases):
            if other := cls.known.get(word):
                raise TypeError(f"two {cls.kind}s are called {word!r}: {other.__qualname__} and {cls.__qualname__}")
            cls.known[word] = cls

    @classmethod
    def registry(cls) -> dict[str, type[Self]]:
        """Every class of this kind by its name, and by its other names, sorted."""
        for module in _files(FOLDERS[cls.kind]):
            importlib.import_module(module)
        return dict(sorted(cls.known.items()))

    @classmethod
    def build(cls, options: str | Mapping[str, Any]) -> Self:
        """What a name, or `{"name": …, option: value, …}`, describes.

        Raises:
            InputError: an unknown name or option, or a value out of range.
        """
        given = {"name": options} if isinstance(options, str) else dict(options)
        name, known = given.pop("name", None), cls.registry()
        if name not in known:
            raise InputError(
                f"no {cls.kind} is called {name!r}{nearest(str(name), known)}; known: {', '.join(sorted(known))}"
            )
        try:
            return known[name](**given)
        except TypeError as error:
            raise InputError(f"{cls.kind} {name}: {str(error).partition('() ')[2] or error}") from error


@functools.cache
def _files(package: str) -> list[str]:
    """The modules in a package."""
    return [f"{package}.{each.name}" for each in pkgutil.iter_modules(importlib.import_module(package).__path__)]


def asked(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, a name and options, without the options that have their default values.

    Imports the folder of the kind where there are options.
    """
    if given.keys() <= {"name"}:
        return dict(given)
    named = importlib.import_module(FOLDERS[kind]).registry().get(given["name"])
    usual = {} if named is None else defaults(named)
    return {key: value for key, value in given.items() if key not in usual or value != usual[key]}


@functools.cache
def defaults(named: type) -> dict[str, Any]:
    """The options of a class that have a default, with its value as JSON has it."""
    found = {}
    for option, hint in options_of(named).items():
        value = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
        if value is not dataclasses.MISSING:
            found[option.name] = TypeAdapter(hint).dump_python(value, mode="json")
    return found


def options_of(named: type) -> dict[dataclasses.Field[Any], Any]:
    """The dataclass fields of a class that are options, with their types, in which numbers have bounds."""
    hints = typing.get_type_hints(named, include_extras=True)
    return {field: _bounded(hints[field.name]) for field in dataclasses.fields(named) if field.init}


def _bounded(hint: Any) -> Any:
    """A type in which no whole number is beyond LARGEST, and no other beyond FARTHEST."""
    if hint is int:
        return Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
    if hint is float:
        return Annotated[float, Field(ge=-FARTHEST, le=FARTHEST, allow_inf_nan=False)]
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if not parts or kind in (Literal, Annotated):
        return hint
    bounded = tuple(map(_bounded, parts))
    return typing.Union[bounded] if kind in (types.UnionType, typing.Union) else kind[bounded]  # noqa: UP007
