"""What goes wrong, in words for the user, the checks that say so, and exit codes. Imports nothing of ours."""

import importlib
import re
import unicodedata
from collections.abc import Iterable
from types import ModuleType

FAILED = 1
"""Exit code: something went wrong that is not the user's doing."""
INPUT = 2
"""Exit code: what the user gave is wrong; see `InputError`."""
SOME_FAILED = 3
"""Exit code: some runs of a sweep failed."""
STOPPED = 75
"""Exit code: told to stop (EX_TEMPFAIL); the same command goes on from there."""
INTERRUPTED = 130
"""Exit code: told to stop by Ctrl-C; the same command goes on from there."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what is wrong and what to do about it."""


class NotFiniteError(ValueError):
    """The training has diverged: weights, or what a model gives, hold infinities or NaN."""


def need(module: str, extra: str) -> ModuleType:
    """Import and return `module`, which comes with the optional dependencies `extra`.

    Raises InputError naming the extra to install where the module is not there.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name.partition(".")[0]):
            raise
        package = module.partition(".")[0]
        raise InputError(f"{package} is not installed: {installing(extra)}") from None


def installing(extra: str) -> str:
    """The command that installs the optional dependencies `extra`, from where rankwise came: index, clone or file."""
    import json  # as below: for a message that few see, and `rankwise.__main__` has no time
    import shlex
    from importlib import metadata
    from urllib.parse import unquote, urlsplit

    try:
        origin = json.loads(metadata.distribution("rankwise").read_text("direct_url.json") or "{}")  # PEP 610
    except metadata.PackageNotFoundError:
        origin = {}
    url, system = origin.get("url"), origin.get("vcs_info", {}).get("vcs")
    if origin.get("dir_info", {}).get("editable"):
        return f"pip install -e {shlex.quote(f'{unquote(urlsplit(url).path)}[{extra}]')}"
    place = f" @ {system}+{url}" if system else f" @ {url}" if url else ""
    return f"pip install {shlex.quote(f'rankwise[{extra}]{place}')}"


def require(holds: bool, message: str) -> None:
    """Raise InputError(message) unless `holds`: how options are checked."""
    if not holds:
        raise InputError(message)


_UNSEEN = re.compile(r"[^\n\t\x20-\x7e]")


def shown(text: str) -> str:
    """`text` for a terminal: what is no character to be seen, such as an escape sequence, is spelt out; lines stay."""

    def spelt(found: re.Match[str]) -> str:
        letter = found.group()
        if letter.isprintable() or unicodedata.category(letter) == "Zs":
            return letter
        if letter == "\r" and text[found.end() : found.end() + 1] == "\n":
            return letter
        return letter.encode("unicode_escape").decode()

    return _UNSEEN.sub(spelt, text)


def shown_line(text: str) -> str:
    """The same for what has to stay in one line, as a cell of a table."""
    return shown(text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t"))


def nearest(word: str, choices: Iterable[str]) -> str:
    """` (did you mean "x"?)` for the choice that looks most like `word`, or an empty string; made to end a message."""
    import difflib  # which takes its time, and `rankwise.__main__` has none

    found = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f' (did you mean "{found[0]}"?)' if found else ""
