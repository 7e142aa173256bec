"""What the `run.yaml` of a run holds: which run it is, what made it and its settings."""

from pathlib import Path
from typing import NamedTuple

from rankwise.errors import InputError
from rankwise.files import read_bytes
from rankwise.runs.grid import is_id, settings_digest
from rankwise.runs.maker import BEFORE, CODE, Maker
from rankwise.settings import WRITTEN, RunConfig, read_yaml

DAMAGED = "its run.yaml is not what was written there: the same rankwise compare or train writes it again"


class RunFile(NamedTuple):
    """What a `run.yaml` holds."""

    id: str
    made: Maker | None
    """None for a file that was written by hand."""
    config: RunConfig
    digest: str
    """Of the settings as they stand there; an older version may have known fewer than `config` has."""

    def begins_with(self, other: "RunFile") -> bool:
        """Whether this run begins with what the other has trained."""
        return self.config.after in (other.digest, other.config.digest())


def apart(one: RunFile, other: RunFile) -> list[str]:
    """Why two runs are not compared with each other, for `said`; [] where they may be."""
    if one.made is None or other.made is None:
        return [] if one.made is other.made else [CODE]
    for first, later in ((one, other), (other, one)):
        if later.begins_with(first) and later.made.before not in ("", first.made.name):  # type: ignore[union-attr]
            return [BEFORE]
    data = [(each.config.task, each.config.tuning is None) for each in (one, other)]
    return one.made.apart(other.made, same_data=data[0] == data[1])


def read(folder: Path) -> RunFile | None:
    """What the `run.yaml` of a run holds; None where it is missing, or not what was written."""
    try:
        settings = read_yaml(folder / "run.yaml")
        name, made_with, _ = (settings.pop(key, None) for key in WRITTEN)
        config = RunConfig.model_validate(settings)
        if name is None or (made_with is not None and not is_id(str(name), settings, made_with)):
            return None  # cut off or changed, it would go on as another run than the one that is named
        made = None if made_with is None else Maker.of(made_with, folder)
        return RunFile(str(name), made, config, settings_digest(settings))
    except (KeyError, TypeError, ValueError, AttributeError):  # InputError and pydantic's are ValueErrors
        return None


def unreadable(folder: Path) -> str:
    """Why nobody can say what a run is; "" where its settings can be read."""
    try:
        read_bytes(folder / "run.yaml")
    except FileNotFoundError:
        return "there is no run.yaml in it, so nobody can say which run it was"
    except InputError as error:
        return str(error).replace(f"{folder}/", "")
    return ""
