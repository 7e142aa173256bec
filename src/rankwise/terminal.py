"""What is said on the terminal: results on stdout, the log on stderr. Any of it may hold names that others gave."""

import json
import sys
from typing import Any

from rankwise.errors import InputError, shown


def show(text: object) -> None:
    """A result, on stdout."""
    print(shown(str(text)))


def log(text: object) -> None:
    """A line of the log, on stderr."""
    print(shown(str(text)), file=sys.stderr)


def show_json(content: Any) -> None:
    """A result as JSON, in which what a terminal would act upon is spelt out."""
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
    show("".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text))


def ask(question: str) -> str:
    """What is typed in answer to a question; empty for nothing."""
    sys.stderr.write(shown(question))
    sys.stderr.flush()
    return sys.stdin.readline()


def agreed(question: str) -> bool:
    """Whether the answer is yes. Raises InputError where there is no terminal to ask on."""
    if not sys.stdin.isatty():
        raise InputError(f"{question} Nobody can be asked where there is no terminal: --yes")
    return ask(f"{question} [y/N] ").strip().lower() in ("y", "yes")
