"""Output on the terminal: results on stdout, the log on stderr. Text may hold control characters, which are escaped."""

import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from rankwise.errors import InputError, shown


def show(text: object) -> None:
    """A result, on stdout."""
    print(shown(str(text)))


def show_marked(lines: Iterable[tuple[str, bool]]) -> None:
    """A result in lines, of which those that are marked have a colour where the terminal shows colours."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line, marked in lines:
        console.print(Text(shown(line), "green" if marked else ""), soft_wrap=True)


def log(text: object) -> None:
    """A line of the log, on stderr. Where it cannot be written, as on a full disk, the command goes on without it."""
    with suppress(OSError):
        print(shown(str(text)), file=sys.stderr)


def show_json(content: Any) -> None:
    """A result as JSON, with characters that a terminal would act on escaped."""
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
    show("".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text))


def ask(question: str) -> str:
    """The line typed in answer to a question."""
    sys.stderr.write(shown(question))
    sys.stderr.flush()
    return sys.stdin.readline()


def agreed(question: str) -> bool:
    """Whether the answer is yes. Raises InputError if there is no terminal to ask on."""
    if not sys.stdin.isatty():
        raise InputError(f"{question} No terminal to answer on: give --yes to go ahead")
    return ask(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def drop_unwritten() -> None:
    """Drop output that cannot be written, or Python would try once more as it ends, fail, and exit with 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def plain_warning(message: Warning | str, *_: object, **__: object) -> str:
    """A warning in one line, without the place in the code that it comes from."""
    return f"warning: {' '.join(str(message).split())}\n"
