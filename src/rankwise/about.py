"""What there is: methods, tasks, papers, architectures, this environment; each for people and as plain data."""

import ast
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import rankwise
from rankwise import archs as architectures
from rankwise import published
from rankwise.named import GROUP, defaults, load_plugin
from rankwise.results.formats import plain
from rankwise.sweep.runners import typed


@dataclass(frozen=True)
class Listing:
    """What is listed, as plain data and as text."""

    content: Any
    text: str


def methods() -> Listing:
    """Every method with its options.

    Files of rankwise are read, not imported: torch, transformers and PEFT take seconds, and nothing here needs them.
    """
    classes: dict[str, ast.ClassDef] = {}
    constants: dict[str, Any] = {}
    for file in sorted((Path(__file__).parent / "methods").glob("*.py")):
        for each in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(each, ast.ClassDef):
                classes[each.name] = each
            elif isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant):
                constants |= {name.id: each.value.value for name in each.targets if isinstance(name, ast.Name)}
    made: dict[str, type] = {}

    def kind(name: str) -> type:
        """A class with the bases that `name` has, for Python to put them in order, and its own options."""
        if name not in made:
            bases = tuple(kind(base.id) for base in classes[name].bases if getattr(base, "id", "") in classes)  # type: ignore[attr-defined]
            made[name] = type(name, bases, {"own": _options_in(classes[name], constants)})
        return made[name]

    found: dict[str, dict[str, Any]] = {}
    for name, read in classes.items():
        for word in (each.value for each in read.keywords if each.arg == "name"):
            options: dict[str, Any] = {}
            for base in reversed(kind(name).__mro__):
                options |= vars(base).get("own", {})
            summary = (ast.get_docstring(read) or "").partition("\n")[0]
            found[ast.literal_eval(word)] = {"summary": summary, "options": options}
    if entry_points(group=GROUP):  # plugins can be read only by importing them
        from rankwise.methods import Method

        for name, method in Method.registry().items():
            if method.plugin:
                found[name] = {"summary": _first_line(method), "options": defaults(method)}
    found = dict(sorted(found.items()))
    lines = []
    for name, about in found.items():
        lines.append(f"{name}: {about['summary']}")
        lines += [f"  {option} = {json.dumps(default)}" for option, default in about["options"].items()]
    return Listing(found, "\n".join(lines))


def _options_in(read: ast.ClassDef, constants: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a dataclass adds to those of its bases, with their defaults as JSON has them."""
    found = {}
    for field in read.body:
        if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation) and field.value:
            value = field.value
            default = constants[value.id] if isinstance(value, ast.Name) else ast.literal_eval(value)
            found[ast.unparse(field.target)] = json.loads(json.dumps(default))
    return found


def tasks() -> Listing:
    """Every task with its metrics."""
    from rankwise.tasks import registry

    options = _options("task")
    found: dict[str, dict[str, Any]] = {
        name: {
            "summary": _first_line(task),
            "score": task.main,
            "metrics": list(task.metrics),
            "text": list(task.text) if isinstance(task.text, tuple) else None,
            "labels": list(task.labels) if isinstance(task.labels, tuple) else None,
            "options": options.get(name, {}),
        }
        for name, task in registry().items()
    }
    rows = [[name, ", ".join(task["metrics"]), task["summary"]] for name, task in found.items()]
    return Listing(found, plain(["task", "metrics", "about"], rows))


def papers() -> Listing:
    """The papers' tables and figures, and the experiment for each."""
    found, header = published.papers(), ["name", "there", "numbers", "experiments/"]
    parts = []
    for paper in found:
        rows = [
            [table.id, f"{table.kind} {table.number}", str(table.numbers), table.experiment] for table in paper.tables
        ]
        parts.append(f"{paper.source}\n\n{plain(header, rows)}")
    return Listing([asdict(paper) for paper in found], "\n\n".join(parts))


def archs() -> Listing:
    """The architectures that parameters can be counted for."""
    found = architectures.archs()
    content = {
        each.name: {"source": each.source, "built_as": each.built_as, "config": each.config} for each in found.values()
    }
    rows = [[each.name, each.built_as, str(each.layers), str(each.width), each.source] for each in found.values()]
    return Listing(content, plain(["arch", "built as", "layers", "width", "source"], rows))


def params(arch: str, method: str, settings: Sequence[str]) -> Listing:
    """What a method trains on an architecture, counted without weights, and what papers print for it.

    `settings` are options of the method, `head=[MODULE,…]` and `plugins=[FILE.py,…]`. Raises InputError for an unknown
    name or option.
    """
    chosen = architectures.find(arch)
    import rankwise.methods
    from rankwise.settings import Schema, load_method
    from rankwise.train.params import count

    options, head = load_method(method, settings, Schema(rankwise.methods.registry(), {}))
    counted = count(chosen, rankwise.methods.build(options), head)
    labels = published.labels(arch, method, options)
    given = " ".join([method, *(f"{key}={typed(value)}" for key, value in options.items() if key != "name")])
    final = "depends on what is learnt" if counted.final is None else f"{counted.final:,}"
    lines = {
        "arch": f"{arch} ({chosen.source}), built as {chosen.built_as}",
        "method": given,
        "trainable": f"{counted.trainable:,}",
        "head": f"{counted.head:,} of these, in {', '.join(head)}" if head else "not counted",
        "final": final if counted.final in (None, counted.trainable) else f"{final} at most",
        "total": f"{counted.total:,}",
        "percent": f"{counted.percent:.4g}",
        "published": "\n           ".join(map(str, labels)) or "-",
    }
    content = {**counted.as_json(), "published": [vars(label) for label in labels]}
    return Listing(content, "\n".join(f"{key:<9}  {value}" for key, value in lines.items()))


def env() -> Listing:
    """Versions, device, and the environment variables that count."""
    import torch

    from rankwise.sweep.runners.local import cores

    found: dict[str, Any] = {"rankwise": rankwise.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found["cores"] = cores()
    found |= {name: os.environ.get(name) for name in ("RANKWISE_DATA", "HF_HOME", "HF_HUB_OFFLINE")}
    return Listing(found, "\n".join(f"{key}: {'-' if value is None else value}" for key, value in found.items()))


def schema(plugins: Sequence[Path] = ()) -> dict[str, Any]:
    """The JSON schema of configuration files, with the methods and tasks of these plugins too."""
    from rankwise.settings import json_schema
    from rankwise.sweep import check

    for file in plugins:
        load_plugin(file)
    return json_schema(check.schema())


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _options(key: str) -> Mapping[str, Mapping[str, Any]]:
    """The options of every method or task, by its name, with their defaults."""
    return {
        entry["properties"]["name"]["const"]: {
            option: value.get("default") for option, value in entry["properties"].items() if "const" not in value
        }
        for entry in schema()["properties"][key]["oneOf"]
        if "properties" in entry
    }
