"""Several folders of runs, read as one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import InputError
from rankwise.runs.store import Store


class Several(Store):
    """The runs below several folders: a run that is in more than one counts once, and nothing is written."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        super().__init__(folders[0])
        self.parts = [Store(folder) for folder in folders]

    @property
    def name(self) -> str:
        return ", ".join(part.name for part in self.parts)

    def folders(self) -> list[Path]:
        """Those of all folders; of a run in several of them a finished copy, if there is one.

        Raises InputError as `Store.folders`, and for a folder without a run.
        """
        return [next((each for each in own if self.result(each)), own[0]) for own in self._by_run().values()]

    def before(self, folder: Path) -> Path | None:
        return Store(folder.parent).before(folder)

    def planned(self) -> None:
        """Nothing: each folder has an experiment of its own."""

    def left_out(self, folders: Sequence[Path] | None = None) -> str:
        twice = sum(len(own) > 1 for own in self._by_run().values())
        runs = "1 run is" if twice == 1 else f"{twice} runs are"
        counted = f"{runs} in more than one of the folders and counted once." if twice else ""
        return " ".join(filter(None, [super().left_out(folders), counted]))

    def described(self) -> tuple[dict[str, Any], str]:
        """The first reference and all published tables that the experiments name, and what is damaged."""
        experiments, damage = zip(*(part.described() for part in self.parts), strict=True)
        references = [(each.get("report") or {}).get("reference") for each in experiments]
        published = [each.get("published") or {} for each in experiments]

        def every(key: str) -> list[str]:
            return list(dict.fromkeys(value for each in published for value in each.get(key) or ()))

        differs = dict.fromkeys(filter(None, (each.get("differs") for each in published)))
        return {
            "report": {"reference": next(filter(None, references), None)},
            "published": {"tables": every("tables"), "changed": every("changed"), "differs": "; ".join(differs)},
        }, " ".join(filter(None, damage))

    def _by_run(self) -> dict[str, list[Path]]:
        runs: dict[str, list[Path]] = {}
        for part in self.parts:
            folders = part.folders()
            if not folders:
                raise InputError(f"{part.folder}: there is no run in it")
            for folder in folders:
                runs.setdefault(folder.name, []).append(folder)
        return runs
