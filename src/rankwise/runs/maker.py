"""What made a run: the version, the revision of the data, and the code that decides its result."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rankwise
from rankwise.files import read_json
from rankwise.runs.code import Code, differing, digest, short

FILE = "maker.json"
"""Next to `run.yaml`: its `made_with`, and a digest of each definition of the code."""
_noted: dict[str, Code] = {}
"""The codes that folders record, and the one of this process, by digest."""


@dataclass(frozen=True)
class Maker:
    """What made a run, or would make it now."""

    version: str
    """Of rankwise."""
    data: str
    """Revision of the task's data."""
    code: str = ""
    """Digest of the code; empty if it was not recorded."""
    before: str = ""
    """For a run in a chain, the `name` of the maker of the run it begins with."""
    folder: Path | None = field(default=None, compare=False)
    """The run folder whose `maker.json` has the digest of each definition."""

    @classmethod
    def now(cls, revision: str, code: Code, before: str = "") -> "Maker":
        """This version and `code`, with data of this revision."""
        name = digest(code)
        _noted[name] = code
        return cls(rankwise.__version__, revision, name, before)

    @classmethod
    def of(cls, made_with: Mapping[str, Any], folder: Path) -> "Maker":
        """From `made_with` of a `run.yaml`. Raises KeyError if it lacks a part."""
        code, before = (str(made_with.get(key, "")) for key in ("code", "before"))
        return cls(str(made_with["rankwise"]), str(made_with["data"]), code, before, folder)

    def made_with(self) -> dict[str, str]:
        """As a `run.yaml` records it."""
        noted = {"rankwise": self.version, "data": self.data, "code": self.code, "before": self.before}
        return {key: value for key, value in noted.items() if value}

    @property
    def name(self) -> str:
        """12 hex digits that stand for all of it."""
        return short(sorted(self.made_with().items()))

    def text(self) -> str:
        """The content of `FILE`."""
        return json.dumps({"made_with": self.made_with(), "code": self.parts()}, indent=1) + "\n"

    def parts(self) -> Code:
        """The digest of each definition of the code; {} if it is not known any more."""
        if self.code not in _noted and self.folder is not None:
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                found = read_json(self.folder / FILE)["code"]
                if digest(found) == self.code:
                    _noted[self.code] = found
        return _noted.get(self.code, {})

    def differs(self, other: "Maker") -> list[str]:
        """What differs from another maker of the same run, for `in_words`; [] if nothing does."""
        found = self._code(other, shared=False)
        return found + [
            what for what in (DATA, VERSION, BEFORE) if getattr(self, _SLOTS[what]) != getattr(other, _SLOTS[what])
        ]

    def apart(self, other: "Maker", same_data: bool) -> list[str]:
        """Why runs of two makers cannot be compared: what differs in the code both use, the version or the data.

        The data counts only if it should be the same.
        """
        found = self._code(other, shared=True)
        if same_data and self.data != other.data:
            found.append(DATA)
        return [*found, VERSION] if self.version != other.version else found

    def _code(self, other: "Maker", shared: bool) -> list[str]:
        if self.code == other.code:
            return []
        ours, theirs = self.parts(), other.parts()
        return differing(ours, theirs, shared) if ours and theirs else [CODE]


CODE, DATA, VERSION, BEFORE = "other code", "other data", "another version of rankwise", "another run before it"
_SLOTS = {DATA: "data", VERSION: "version", BEFORE: "before"}


def in_words(differences: Iterable[str]) -> str:
    """The differences in words: `other code and other data: methods/lora.py differs`."""
    found = list(dict.fromkeys(differences))
    files = [each for each in found if each != CODE and each not in _SLOTS]
    words = [*([CODE] if files or CODE in found else []), *(each for each in found if each in _SLOTS)]
    shown = files if len(files) <= 5 else [*files[:4], f"{len(files) - 4} others"]
    text = " and ".join(words)
    if not shown:
        return text
    listed = f"{', '.join(shown[:-1])} and {shown[-1]} differ" if shown[1:] else f"{shown[0]} differs"
    return f"{text}: {listed}"
