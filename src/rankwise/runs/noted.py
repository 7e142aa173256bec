"""The experiment of a folder of runs, recorded next to them."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rankwise.errors import InputError
from rankwise.files import read_json, unwritable, write_whole
from rankwise.runs.record import damaged
from rankwise.settings import Experiment, Published, as_yaml, read_yaml

PLAN = "plan.json"
"""The names of the folders that the experiment asks for; those that follow from tuning are added as they come up."""


class _Part(BaseModel):
    """A part of the file; other keys in it are ignored."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Method(_Part):
    name: str


class _Report(_Part):
    title: str = ""
    text: str = ""
    reference: _Method | None = None


class _Needed(_Part):
    """What of an `experiment.yaml` a report reads."""

    report: _Report = Field(default_factory=_Report)
    published: Published | None = None


class Noted:
    """A folder of runs with its `experiment.yaml` and `PLAN`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def note(self, experiment: Experiment, folders: Iterable[Path] = ()) -> None:
        """Write the experiment next to its runs, with the folders of all runs of it that are known by now.

        Raises InputError if nothing can be written.
        """
        content = experiment.model_dump(
            mode="json", include={"vary", "chain", "tune", "report", "published"}, exclude_defaults=True
        )
        content = {"name": experiment.name, **experiment.base, **content}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / "experiment.yaml", as_yaml(content))
        except OSError as error:
            raise unwritable(self.folder, error) from None
        self._write_plan({folder.name for folder in folders})

    def plan(self, folders: Iterable[Path]) -> None:
        """Add `folders` to the runs that the recorded experiment asks for, if there is one. Raises as `note` does."""
        names = self.planned()
        if names is not None:
            self._write_plan(names | {folder.name for folder in folders})

    def planned(self) -> set[str] | None:
        """The names of the folders that the experiment asks for; None if that is not recorded."""
        try:
            found = read_json(self.folder / PLAN)
        except (OSError, ValueError):  # InputError is a ValueError
            return None
        return set(map(str, found)) if isinstance(found, list) else None

    def _write_plan(self, names: set[str]) -> None:
        try:
            write_whole(self.folder / PLAN, json.dumps(sorted(names), indent=1) + "\n")
        except OSError as error:
            raise unwritable(self.folder, error) from None

    def experiment(self) -> dict[str, Any]:
        """What `note` wrote (name, vary, tune, report, and the settings all runs share); {} if there is none.

        Raises InputError if it is damaged.
        """
        file = self.folder / "experiment.yaml"
        if not os.path.lexists(file):
            return {}
        try:
            content = read_yaml(file)
            _Needed.model_validate(content)
            return content
        except (InputError, ValidationError) as error:
            why = damaged(file, error) if isinstance(error, ValidationError) else error
            raise InputError(f"{file} is damaged ({why}); the same rankwise compare writes it again") from None

    def described(self) -> tuple[dict[str, Any], str]:
        """What `experiment` gives and "", or {} and how it is damaged, as runs can be shown without it."""
        try:
            return self.experiment(), ""
        except InputError as error:
            return {}, str(error)
