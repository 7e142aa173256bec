"""Where runs are carried out: one file per runner, found by its name. A new runner is one new file here."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from rankwise.errors import InputError, nearest
from rankwise.processes.launched import launched
from rankwise.settings import load_options
from rankwise.sweep.runners.base import Ended, Runner

__all__ = ["Ended", "Runner", "described", "registry", "runner", "typed"]

registry = Runner.registry


def runner(name: str, options: Sequence[str] = ()) -> Runner:
    """The runner called `name` with these `key=value` options.

    Raises InputError for an unknown name or option, a value out of range, a missing package, and in one of several
    processes that a launcher has started.
    """
    if launched() > 1:
        raise InputError("a sweep is one process: start it without accelerate launch or torchrun")
    known = registry()
    if name not in known:
        raise InputError(f"--runner {name}: there is no such runner{nearest(name, known)}; known: {', '.join(known)}")
    return known[name](**load_options("runner", name, options, known))


def described() -> str:
    """Every runner with its options and their defaults, as the end of a help text."""
    return "\n\n".join(_described(f"--runner {name}", kind) for name, kind in registry().items())


def _described(title: str, kind: type[Runner]) -> str:
    text = f"{title}: {inspect.getdoc(kind)}".replace("\n\nAttributes:\n", "\n")
    for field in dataclasses.fields(kind):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.init and value is not None:
            text = text.replace(f"\n    {field.name}: ", f"\n    {field.name}={typed(value)}: ")
    return text


def typed(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(typed, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
