"""The code that decides the result of a run, as digests of its definitions.

It is what can be reached from the function that carries out a run and from the run's method and task: functions,
classes and constants of rankwise or of a plugin, each by the text of its syntax tree. Comments, docstrings, the text of
errors and the file of a definition do not count. So moving or rewording code changes nothing, and a change to a method
affects only its own runs. Code that only stores, shows or asks is left out (ASIDE).

Files are read; nothing is imported.
"""

import ast
import functools
import hashlib
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import rankwise
from rankwise.files import uncollected
from rankwise.named import imports

ASIDE = {
    *("about", "adapters", "api", "archs", "cli", "commands", "errors", "files", "foreign", "named", "pictures"),
    *("published", "report", "reporters", "results", "runs", "seen", "settings", "starter", "sweep", "terminal"),
    "train/memory_need",
}
"""Files and folders of rankwise that do not decide a result."""

Code = dict[str, dict[str, str]]
"""File, as shown to people -> public function or class in it -> digest of it and of its details.

Details are the constants and private definitions that it uses: in many files they have the same names.
"""

_Place = tuple[str, str]
"""Module and name of a definition."""


def code_of(*roots: Callable[..., Any]) -> Code:
    """The code that functions and classes need, including themselves and their bases: rankwise's or a plugin's."""
    places, without_file = [], {}
    for root in roots:
        own = root.__module__.partition(".")[0]
        for each in root.__mro__ if isinstance(root, type) else (root,):
            if each.__module__.partition(".")[0] in ("rankwise", own):
                places.append((each.__module__, each.__qualname__.partition(".")[0]))
                if each.__module__ == "__main__" and _loaded("__main__") is None:
                    without_file[each.__qualname__] = _compiled(each)
    code = code_at(_ROOT, *places)
    return {**code, "__main__": without_file} if without_file else code


@functools.cache
@uncollected()
def code_at(package: Path, *roots: _Place) -> Code:
    """The same, with the package's source in any folder; `roots` are modules and names in them."""
    plugins = {module for module, _ in roots if module.partition(".")[0] != "rankwise"}
    ours = frozenset(module.partition(".")[0] for module in plugins if "." in module)
    beside = frozenset(file.parent for module in plugins if (file := _loaded(module)))
    reader, code = _reader(package, ours, beside), Code()
    for place in sorted(reader.reached(roots)):
        if reader.stands_alone(place):
            code.setdefault(reader.shown(place[0]), {})[place[1]] = reader.digest(place)
    return code


def digest(code: Code) -> str:
    """12 hex digits for a code, whichever files its definitions are in."""
    return short(sorted((name, each) for file in code.values() for name, each in file.items()))


def differing(one: Code, other: Code, shared: bool = False) -> list[str]:
    """The files in which two codes differ; with `shared` only in definitions that both have."""
    ours, theirs = _by_name(one), _by_name(other)
    names = {
        name
        for name in ours | theirs
        if (name in ours and name in theirs) or not shared
        # two files may define one name, and one of the codes may have only one of these definitions
        if not (_within(ours, theirs, name) if shared else ours.get(name) == theirs.get(name))
    }
    return sorted({file for code in (one, other) for file, found in code.items() if not names.isdisjoint(found)})


def _by_name(code: Code) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for file in code.values():
        for name, each in file.items():
            found.setdefault(name, set()).add(each)
    return found


def _within(ours: dict[str, set[str]], theirs: dict[str, set[str]], name: str) -> bool:
    return ours[name] <= theirs[name] or theirs[name] <= ours[name]


def short(what: Any) -> str:
    """12 hex digits for anything with a `repr`."""
    return hashlib.sha256(repr(what).encode(errors="backslashreplace")).hexdigest()[:12]


@dataclass
class _Module:
    """What a file defines and imports at any depth."""

    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name here -> module, and the name there; "" for the module itself."""
    stars: list[str] = field(default_factory=list)


class _Reader:
    """The definitions of the package and of the packages in `ours`, and of loose files in the folders `beside`."""

    def __init__(self, package: Path, ours: frozenset[str], beside: frozenset[Path]) -> None:
        self._package, self._ours, self._beside = package, ours, beside
        self._files: dict[str, Path | None] = {}
        self._modules: dict[str, _Module | None] = {}
        self._bare: dict[_Place, tuple[str, set[_Place]]] = {}

    def reached(self, roots: Iterable[_Place]) -> set[_Place]:
        """All definitions that the roots need, they themselves among them."""
        left = [place for root in roots for place in self._begin(root)]
        found = set[_Place]()
        while left:
            place = left.pop()
            if place not in found:
                found.add(place)
                left += self.bare(place)[1]
        return found

    def _begin(self, root: _Place) -> list[_Place]:
        module, name = root
        here = self._module(module)
        if here is None:
            return []
        # made in a function: everything in its module counts
        return [root] if name in here.definitions else [(module, each) for each in here.definitions]

    def stands_alone(self, place: _Place) -> bool:
        """Whether a definition is a public function or class, and no detail of those that use it."""
        here = self._module(place[0])
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        return here is not None and not place[1].startswith("_") and isinstance(here.definitions[place[1]][-1], kinds)

    def digest(self, place: _Place) -> str:
        """Of a definition and of the details that it uses."""
        left, found = [place], set[_Place]()
        while left:
            one = left.pop()
            if one not in found:
                found.add(one)
                left += [used for used in self.bare(one)[1] if not self.stands_alone(used)]
        return short([self.bare(place)[0], *sorted(self.bare(each)[0] for each in found - {place})])

    def shown(self, module: str) -> str:
        """The file of a module, as shown to people."""
        file = self._file(module)
        if file is None:
            return module
        return str(file.relative_to(self._package)) if file.is_relative_to(self._package) else file.name

    def _file(self, name: str) -> Path | None:
        """The file of a module that is ours; None for others."""
        top, *parts = name.split(".")
        if top == "rankwise":
            if name not in self._files:
                base = self._package.joinpath(*parts)
                both = (base / "__init__.py", base.with_suffix(".py"))
                self._files[name] = next((file for file in both if file.is_file()), None)
            return self._files[name]
        loaded = _loaded(name)
        if loaded and (top in self._ours or loaded.parent in self._beside):
            return loaded
        if name not in self._files:
            folders = [folder for folder in self._beside if not _INSTALLED & {*folder.parts}]
            bases = [folder.joinpath(top, *parts) for folder in folders]
            files = [file for base in bases for file in (base / "__init__.py", base.with_suffix(".py"))]
            # a module that is not imported yet counts too
            here = (file for file in files if file.is_file() and (name not in sys.modules or loaded == file))
            self._files[name] = next(here, None)
        return self._files[name]

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            file = self._file(name)
            parts = name.split(".")
            left_out = parts[0] == "rankwise" and (len(parts) == 1 or bool({parts[1], "/".join(parts[1:])} & ASIDE))
            self._modules[name] = None if file is None or left_out else _parsed(file, name)
        return self._modules[name]

    def resolve(self, module: str, name: str) -> _Place | str:
        """What a name in a module means: a definition of ours, (module, "") for one of our modules, or a foreign name.

        An empty string for what is neither imported nor defined there.
        """
        here = self._module(module)
        if here is None or name in here.definitions:
            return (module, name) if here else f"{module}.{name}" if self._file(module) is None else ""
        if name in here.imported:
            target, there = here.imported[name]
            package = self._module(target)
            # a package may have a function with the name of its file
            held = package is not None and there in {*package.definitions, *package.imported}
            if not there or (self._file(f"{target}.{there}") and not (held and target != module)):
                return self._as_module(f"{target}.{there}" if there else target)
            if target == "rankwise" and there in rankwise._PUBLIC:
                target = rankwise._PUBLIC[there]
            return self.resolve(target, there)
        if self._file(f"{module}.{name}"):
            return self._as_module(f"{module}.{name}")
        return next((found for star in here.stars if (found := self.resolve(star, name))), "")

    def _as_module(self, name: str) -> _Place | str:
        return (name, "") if self._file(name) else name

    def bare(self, place: _Place) -> tuple[str, set[_Place]]:
        """The text of a definition without what does not count, and the definitions of ours in it."""
        if place not in self._bare:
            module, name = place
            here = self._module(module)
            visitor = _Bare(self, module)
            text = [ast.unparse(visitor.visit(each)) for each in here.definitions[name]] if here else []
            self._bare[place] = (repr([*text, *sorted(visitor.foreign)]), visitor.used - {place})
        return self._bare[place]


class _Bare(ast.NodeTransformer):
    """Removes what does not count from a definition, and undoes `import … as`: our definitions get their own names."""

    def __init__(self, reader: _Reader, module: str) -> None:
        self._reader, self._module = reader, module
        self.used = set[_Place]()
        self.foreign = set[str]()
        self._raising = False

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)  # a docstring, or `...`

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        self._raising = True
        try:
            return self.generic_visit(node)
        finally:
            self._raising = False

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if self._raising and isinstance(node.value, str) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("") if self._raising else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._named(self._reader.resolve(self._module, node.id)) or node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return self._named(self._chain(node)) or self.generic_visit(node)

    def _chain(self, node: ast.expr) -> _Place | str:
        """What `a.b.c` means where `a` is a module of ours; an empty string else."""
        if isinstance(node, ast.Name):
            return self._reader.resolve(self._module, node.id)
        if isinstance(node, ast.Attribute):
            owner = self._chain(node.value)
            if isinstance(owner, tuple) and not owner[1]:
                return self._reader.resolve(owner[0], node.attr)
        return ""

    def _named(self, found: _Place | str) -> ast.Name | None:
        if isinstance(found, str):
            self.foreign.update({found} - {""})
            return None
        if not found[1]:
            return None
        self.used.add(found)
        return ast.Name(found[1], ast.Load())


_reader = functools.cache(_Reader)
_ROOT = Path(rankwise.__file__).parent
_STANDARD = sysconfig.get_path("stdlib")
_INSTALLED = {"site-packages", "dist-packages"}
"""Names of the folder of installed packages, which may be inside that of the standard library."""


def _loaded(name: str) -> Path | None:
    """The source file of a loaded module that is not in the standard library."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None or not file.endswith(".py"):
        return None
    own = Path(file).is_relative_to(_STANDARD) and not _INSTALLED & {*Path(file).relative_to(_STANDARD).parts}
    return None if own else Path(file)


def _compiled(root: Callable[..., Any]) -> str:
    """Digest of a function or class without a file, as in a notebook: its code and what it uses of its module."""
    module, seen, texts = root.__module__, dict[int, Any](), list[str]()
    left: list[Any] = [root]
    while left:
        each = left.pop()
        if isinstance(each, bool | int | float | str | bytes | None):
            texts.append(repr(each))
            continue
        if id(each) in seen:
            continue
        seen[id(each)] = each  # kept alive, so that no other object gets its id
        if isinstance(each, type) and each.__module__ == module:
            own = {key: value for key, value in vars(each).items() if callable(value) or not key.startswith("__")}
            texts += map(repr, sorted(own))
            left += [own[key] for key in sorted(own)]
        elif isinstance(each, FunctionType) and each.__module__ == module:
            text, names = _of_code(each.__code__)
            texts.append(text)
            used = [each.__globals__[name] for name in sorted(names) if name in each.__globals__]
            cells = [cell.cell_contents for cell in each.__closure__ or ()]
            left += [*used, *cells, each.__defaults__, each.__kwdefaults__]
        elif isinstance(each, _WRAPPERS):
            left += [getattr(each, key, None) for key in ("__wrapped__", "func", "args", "keywords", "fget", "fset")]
        elif isinstance(each, dict):
            left += [*each, *each.values()]
        elif isinstance(each, tuple | list):
            left += each
        elif isinstance(each, set | frozenset):
            left += sorted(each, key=repr)
    return short(texts)


_WRAPPERS = (
    *(classmethod, staticmethod, property, functools.partial, functools.cached_property),
    type(functools.cache(print)),
)
"""Kinds of objects that wrap a function."""


def _of_code(code: CodeType) -> tuple[str, set[str]]:
    """Compiled code as text, and the names in it that are not its own."""
    names, texts = {*code.co_names}, [code.co_code.hex(), repr(code.co_names), repr(code.co_varnames)]
    for each in code.co_consts:
        if isinstance(each, CodeType):
            text, more = _of_code(each)
            names |= more
        else:
            text = repr(sorted(map(repr, each)) if isinstance(each, frozenset) else each)
        texts.append(text)
    return repr(texts), names


def _parsed(file: Path, name: str) -> _Module:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    module = _Module()
    tree = ast.parse(file.read_bytes())
    for source, there, here in imports(tree, package):
        if there == "*":
            module.stars.append(source)
        elif there:
            module.imported[here or there] = (source, there)
        else:
            top = source if here else source.partition(".")[0]
            module.imported[here or top] = (top, "")
    _define(module, tree.body)
    return module


def _define(module: _Module, body: list[ast.stmt]) -> None:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
        else:
            for part in ("body", "handlers", "orelse", "finalbody"):
                _define(module, [each for each in getattr(node, part, ()) if isinstance(each, ast.stmt)])
            continue
        for name in names:
            if name != "__all__":
                module.definitions.setdefault(name, []).append(node)
