"""What is chosen by name: methods, tasks and runners. A class registers itself, and its dataclass fields are options.

>>> class LoRA(Method, name="lora"): ...
>>> Method.build({"name": "lora", "rank": 4})

Each kind has a folder. Every file in it is imported before anything is looked up, so a new file is all it takes.
Classes from outside come from plugins: modules that installed packages name as entry points of the group `rankwise`,
and Python files that a configuration names at `plugins:`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import operator
import os
import pkgutil
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, TypeAdapter

from rankwise.errors import InputError, nearest, require

FOLDERS = {"method": "rankwise.methods", "task": "rankwise.tasks", "runner": "rankwise.sweep.runners"}
"""Kind -> the package whose files hold its classes."""
GROUP = "rankwise"
"""The group of entry points whose modules are plugins."""
LARGEST = 2**31 - 1
"""Bound of a whole number on both sides of 0; no option counts more than that."""
FARTHEST = 1e38
"""Bound of any other number on both sides of 0: what a float32 can hold."""


class Named:
    """Base of a kind, `class Method(Named, kind="method")`, whose subclasses are found by name."""

    kind: ClassVar[str]
    known: ClassVar[dict[str, type[Any]]]
    """Name -> class, for everything imported so far, sorted by name."""
    name: ClassVar[str] = ""
    plugin: ClassVar[str] = ""
    """The plugin that the class comes from, a file or the name of a package; empty without one."""

    def __init_subclass__(cls, name: str = "", aliases: Sequence[str] = (), kind: str = "", **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if kind:
            cls.kind, cls.known = kind, {}
        if not name:
            return
        cls.name, cls.plugin = name, "" if _is_ours(cls) else loading()
        for word in (name, *aliases):
            if (other := cls.known.get(word)) and not _redefined(other, cls):
                raise TypeError(f"two {cls.kind}s are called {word!r}: {other.__qualname__} and {cls.__qualname__}")
            cls.known[word] = cls
        _sort(cls.known)

    def __post_init__(self) -> None:
        """Raise InputError for an option that is not one of its choices, or out of the bounds of its type."""
        for option, choices, bounds in _limits(type(self)):  # type: ignore[arg-type]
            value = getattr(self, option)
            if choices:
                require(value in choices, f"{option} must be one of {', '.join(map(str, choices))}, not {value!r}")
            elif value is not None and not all(_HOLDS[bound](value, limit) for bound, limit in bounds.items()):
                raise InputError(f"{option} must {_in_words(bounds)}, not {value}")

    @classmethod
    def registry(cls) -> Mapping[str, type[Self]]:
        """Every class of this kind by its name, and by its other names, sorted.

        Plugins that are loaded later appear in it.

        Raises:
            InputError: a plugin of an installed package that cannot be loaded.
        """
        known = cls.ours()
        load_installed()
        return known

    @classmethod
    def ours(cls) -> Mapping[str, type[Self]]:
        """The same without what plugins of installed packages may still add."""
        for module in _files(FOLDERS[cls.kind]):
            importlib.import_module(module)
        return types.MappingProxyType(cls.known)

    @classmethod
    def build(cls, options: str | Mapping[str, Any]) -> Self:
        """What a name, or `{"name": …, option: value, …}`, describes.

        Raises:
            InputError: an unknown name or option, or a value out of range.
        """
        given = {"name": options} if isinstance(options, str) else dict(options)
        name, known = str(given.pop("name", None)), cls.registry()
        if name not in known:
            raise InputError(
                f"no {cls.kind} is called {name!r}{nearest(name, known)}; known: {', '.join(sorted(known))}"
            )
        try:
            return known[name](**given)
        except TypeError as error:
            raise InputError(f"{cls.kind} {name}: {str(error).partition('() ')[2] or error}") from error


_loading: list[str] = []
"""The plugins that are being loaded, the innermost last."""
_digests: dict[Path, dict[Path, str]] = {}
"""Loaded plugin file -> digests of that file and of the files next to it that it imports, as they were loaded."""


def loading() -> str:
    """The plugin that is being loaded, a file or the name of a package; empty for none."""
    return _loading[-1] if _loading else ""


@functools.cache
def load_installed() -> None:
    """Load the plugins of installed packages, once.

    Raises:
        InputError: one that cannot be loaded.
    """
    for entry in importlib.metadata.entry_points(group=GROUP):
        package = entry.dist.name if entry.dist else entry.value
        with _plugin(package, f"{entry.value}, a plugin of the package {package},"):
            entry.load()


def load_plugin(path: str | Path) -> Path:
    """Load a plugin file, once in a process, and return its absolute path. It can import the modules next to it.

    Raises:
        InputError: no Python file, one that cannot be loaded or has changed since it was loaded, or a module name that
            is taken.
    """
    file = _absolute(Path(path))
    require(file.is_file(), f"{path} is no file: name the Python file of the plugin")
    require(file.suffix == ".py", f"{path} is no Python file: its name must end in .py")
    parts = _parts(file)
    digests = {part: hashlib.sha256(part.read_bytes()).hexdigest() for part in parts.values()}
    for part, digest in _digests.get(file, {}).items():
        changed = path if part == file else part
        require(digests.get(part) == digest, f"{changed} has changed since it was loaded: restart Python")
    if _source(sys.modules.get(file.stem)) != file:
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        importlib.invalidate_caches()
        own = _would_be(file.stem) == file
        require(own, f"{path} cannot be imported as {file.stem!r}: another module has that name: rename the file")
        for name, part in parts.items():
            own = _would_be(name) in (None, part)
            require(own, f"{path} imports {name!r}, and another module has that name: rename {part}")
        with _plugin(str(file), str(path)), redirect_stdout(sys.stderr):
            importlib.import_module(file.stem)
    _digests[file] = digests
    return file


def _absolute(path: Path) -> Path:
    """An absolute path without `..`, the same however the file is named."""
    file = path.expanduser().absolute()
    plain = Path(os.path.normpath(file))
    return plain if not file.exists() or (plain.exists() and plain.samefile(file)) else file.resolve()


def _parts(file: Path) -> dict[str, Path]:
    """Module name -> file, for a plugin file and all files next to it that it imports, itself or through others."""
    found: dict[str, Path] = {}
    left = [(file.stem, file)]
    while left:
        module, part = left.pop()
        if module in found:
            continue
        found[module] = part
        for name in _imported(part, module if part.name == "__init__.py" else module.rpartition(".")[0]):
            words = name.split(".") if name.partition(".")[0] not in sys.stdlib_module_names else []
            for count in range(1, len(words) + 1):
                base = file.parent.joinpath(*words[:count])
                for each in (base / "__init__.py", base.with_suffix(".py")):
                    if each.is_file():
                        left.append((".".join(words[:count]), each))
                        break
    return found


def _imported(file: Path, package: str) -> set[str]:
    """What a file imports: modules, and names in modules, which may be modules too. Empty if it cannot be parsed."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    return {f"{module}.{name}" if name else module for module, name, _ in imports(tree, package) if module}


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, str, str]]:
    """The imports of a file in `package`, at any depth: a module, a name in it ("" for none), the name after `as`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((each.name, "", each.asname or "") for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((module, each.name, each.asname or "") for each in node.names)


def _would_be(name: str) -> Path | None:
    """The file that a module is, or would be, imported from; None if only its import can tell."""
    if name in sys.modules or "." in name:
        return _source(sys.modules.get(name))
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).absolute() if spec and spec.origin else None


def _source(module: types.ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).absolute() if file else None


@contextmanager
def _plugin(name: str, words: str) -> Iterator[None]:
    """Classes made in here come from the plugin `name`. If it fails, they are removed, and an InputError says why."""
    _loading.append(name)
    try:
        yield
    except (Exception, SystemExit) as error:
        for kind in Named.__subclasses__():
            for word in [word for word, each in kind.known.items() if each.plugin == name]:
                del kind.known[word]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        where = f" in line {lines[-1]}" if lines else ""
        what = " ".join(str(error).split()) or "no reason is given"
        raise InputError(f"{words} cannot be loaded: {type(error).__name__}{where}: {what}") from error
    finally:
        _loading.pop()


def check_reachable(named: type[Named], plugins: Sequence[str]) -> None:
    """Raise InputError for a class that other processes do not find: they load `plugins` and installed packages."""
    if _is_ours(named) or (named.plugin and not named.plugin.endswith(".py")):
        return
    if not any(comes_from(named, plugin) for plugin in plugins):
        raise InputError(
            f"{named.kind} {named.name} is defined in {named.__module__}, which the processes of the runs do not load: "
            "name its file at plugins, as in plugins=[my.py]"
        )


def comes_from(named: type[Named], plugin: str) -> bool:
    """Whether a class is in this plugin file, or was made while it was loaded."""
    return plugin in (named.plugin, str(_source(sys.modules.get(named.__module__))))


def _redefined(old: type, new: type) -> bool:
    """Whether a class is defined again without a file, as when a cell of a notebook is run again."""
    same = (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)
    file = _source(sys.modules.get("__main__"))
    return same and new.__module__ == "__main__" and (file is None or not file.is_file())


def _is_ours(named: type) -> bool:
    return named.__module__.partition(".")[0] == "rankwise"


def _sort(known: dict[str, Any]) -> None:
    """Sort by name, in place: views of it stay views of it."""
    for name in sorted(known):
        known[name] = known.pop(name)


@functools.cache
def _files(package: str) -> list[str]:
    """The modules in a package."""
    return [f"{package}.{each.name}" for each in pkgutil.iter_modules(importlib.import_module(package).__path__)]


def written(value: Any) -> Any:
    """What to write for a value that JSON does not have: a method or task as its name and options, others as text."""
    if not isinstance(value, Named):
        return str(value)
    options = (option.name for option in dataclasses.fields(value) if option.init)  # type: ignore[arg-type]
    return {"name": value.name, **{option: getattr(value, option) for option in options}}


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


def options_of(named: type, ranges: bool = False) -> dict[dataclasses.Field[Any], Any]:
    """The dataclass fields of a class that are options, with their types, in which no number is without bounds.

    With `ranges` these are also the option's own, which else the class itself checks.
    """
    hints = _hints(named) if ranges else typing.get_type_hints(named)
    return {field: _bounded(hints[field.name]) for field in dataclasses.fields(named) if field.init}


def _hints(named: type) -> dict[str, Any]:
    """The types of fields. One that only has another default in a subclass has the bounds of its base all the same."""
    found: dict[str, Any] = {}
    for base in reversed(named.__mro__):
        plain = typing.get_type_hints(base)
        for name, hint in typing.get_type_hints(base, include_extras=True).items():
            same = name in found and hint == plain[name] and _plain(found[name]) == hint
            found[name] = found[name] if same else hint
    return found


def _plain(hint: Any) -> Any:
    """A type without what is annotated."""
    return typing.get_type_hints(type("_", (), {"__annotations__": {"hint": hint}}))["hint"]


_HOLDS = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}


@functools.cache
def _limits(named: type) -> list[tuple[str, tuple[Any, ...], dict[str, float]]]:
    """Of each option its name, the choices of its `Literal` and the bounds of its `Annotated[…, Field(ge=1)]`."""
    hints, found = _hints(named), []
    for option in dataclasses.fields(named):
        hint = hints[option.name]
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        marks = [info for part in (hint, *typing.get_args(hint)) for info in getattr(part, "__metadata__", ())]
        limits = [limit for info in marks for limit in getattr(info, "metadata", ())]
        bounds = {bound: getattr(limit, bound) for limit in limits for bound in _HOLDS if hasattr(limit, bound)}
        if choices or bounds:
            found.append((option.name, choices, bounds))
    return found


def _in_words(bounds: Mapping[str, float]) -> str:
    match bounds:
        case {"ge": low, "lt": high}:
            return f"be in [{low}, {high})"
        case {"gt": low, "lt": high}:
            return f"be between {low} and {high}"
        case {"ge": 0}:
            return "not be negative"
        case {"ge": low}:
            return f"be at least {low}"
        case {"gt": low}:
            return f"be above {low}"
    return f"be within {dict(bounds)}"


def _bounded(hint: Any) -> Any:
    """A type in which no whole number is beyond LARGEST, and no other beyond FARTHEST."""
    if hint is int:
        return Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
    if hint is float:
        return Annotated[float, Field(ge=-FARTHEST, le=FARTHEST, allow_inf_nan=False)]
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        return Annotated[(_bounded(parts[0]), *parts[1:])]
    if not parts or kind is Literal:
        return hint
    bounded = tuple(map(_bounded, parts))
    return typing.Union[bounded] if kind in (types.UnionType, typing.Union) else kind[bounded]  # noqa: UP007
