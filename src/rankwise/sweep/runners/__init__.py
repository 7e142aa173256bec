"""Where runs are carried out: one file per runner, found by its name. A new runner is one new file here."""

from collections.abc import Sequence

from rankwise.errors import InputError, nearest
from rankwise.processes.launched import launched
from rankwise.settings import load_options
from rankwise.sweep.runners.base import Ended, Runner

__all__ = ["Ended", "Runner", "registry", "runner"]

registry = Runner.registry


def runner(name: str, options: Sequence[str] = ()) -> Runner:
    """The runner called `name` with these `key=value` options.

    Raises InputError for a name or an option that nobody has, for a value out of range, for a missing package, and in
    one of several processes that a launcher has started.
    """
    if launched() > 1:
        raise InputError("a sweep is one process: start it without accelerate launch or torchrun")
    known = registry()
    if name not in known:
        raise InputError(f"--runner {name}: there is no such runner{nearest(name, known)}; known: {', '.join(known)}")
    return known[name](**load_options("runner", name, options, known))
