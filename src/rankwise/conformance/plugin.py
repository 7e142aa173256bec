"""A method in a file of its own, outside the package: loaded, and checked as ours are."""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from rankwise.conformance.checks import CHECKS, STEPS, Case
from rankwise.errors import require
from rankwise.methods import Method
from rankwise.named import comes_from, load_plugin
from rankwise.settings import Schema, load_method


@dataclass(frozen=True)
class Finding:
    """What one check has found on one architecture; `broken` says how the promise is broken, empty where it is kept."""

    method: str
    check: str
    shape: str
    broken: str = ""

    def __str__(self) -> str:
        result = f"BROKEN: {self.broken}" if self.broken else "kept"
        return f"{self.method:<14}  {self.check:<57}  {self.shape:<10}  {result}"


def check_file(file: Path, options: Sequence[str] = ()) -> Iterator[Finding]:
    """Check the methods in a Python file, with `key=value` options.

    Raises:
        InputError: a file without a method, or an option that it does not have.
    Warns:
        UserWarning: the checks end before the method first looks at its ranks.
    """
    known, plugin = Method.registry(), str(load_plugin(file))
    names = [name for name, method in known.items() if comes_from(method, plugin)]
    require(bool(names), f'{file} holds no method: write class X(Method, name="x")')
    schema = Schema(known, {})
    for method in [Method.build(load_method(name, options, schema)[0]) for name in names]:
        yield from check_method(method)
        if method.check_every > STEPS:
            warnings.warn(
                f"{method.name} first looks at its ranks after step {method.check_every}, and the checks train {STEPS} "
                "steps: give it options by which it does so sooner, such as every=2",
                stacklevel=2,
            )


def check_method(method: Method) -> Iterator[Finding]:
    """Run every check on every architecture that it is meant for, and give what each finds as soon as it is done."""
    for check, shapes in CHECKS.items():
        for shape in shapes:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    with contextlib.redirect_stdout(io.StringIO()), _only_own_warnings():  # a Trainer prints its log
                        check(Case(method, Path(folder), shape))
                    broken = ""
                except Exception as error:  # a method of someone else's may fail in any way
                    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                    broken = kind + " ".join(str(error).split())
            yield Finding(method.name, check.__name__.replace("_", " "), shape, broken)


@contextlib.contextmanager
def _only_own_warnings() -> Iterator[None]:
    """Around a check: what transformers says of the small models is nothing that the method's author can change."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's call
            yield
    finally:
        logging.set_verbosity(verbosity)
