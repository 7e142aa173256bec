"""The tasks: one file each, found by name. A new task is one new file in this folder, nothing edited."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from rankwise.errors import InputError, nearest
from rankwise.tasks.base import Evaluation, Scored, Split, Task, subset

__all__ = ["Evaluation", "Scored", "Split", "Task", "build", "registry", "subset"]


def registry() -> dict[str, type[Task]]:
    """Every task by its name (and every other name it goes by), sorted by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(Task.known.items()))


def build(settings: str | Mapping[str, Any]) -> Task:
    """The task of a name, or of a mapping of `name` and options. Its data is read when a split is asked for.

    InputError for a name nobody has; TypeError for an option that the task does not have.
    """
    options = {"name": settings} if isinstance(settings, str) else dict(settings)
    name, known = options.pop("name"), registry()
    if name not in known:
        raise InputError(f"no task is called {name!r}; `rankwise tasks` lists them{nearest(name, known)}")
    return known[name](**options)
