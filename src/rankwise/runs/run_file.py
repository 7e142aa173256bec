"""The `run.yaml` of a run: its id, what made it, and its settings. Read and written only here.

Its last line is a digest of all lines above, so a file that was cut off or changed is noticed without interpreting its
settings. The id is read, not computed again: that would need the defaults, and so torch.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rankwise.errors import InputError
from rankwise.files import opened, read_bytes, remembered
from rankwise.runs.maker import BEFORE, CODE, Maker
from rankwise.settings import FORMAT, WRITTEN, Kind, RunConfig, as_yaml, parse_yaml, read_yaml, run_config

NAME = "run.yaml"
DAMAGED = "its run.yaml is not what was written there: the same rankwise compare or train writes it again"
_DIGEST = "digest: "
_WITHOUT = {"fast": False}
"""What settings were that a file does not have, where the default is another one today."""


@dataclass(frozen=True)
class RunFile:
    """What a `run.yaml` holds."""

    id: str
    config: RunConfig
    maker: Maker | None
    """None for a file written by hand."""
    kind: Kind
    format: int = FORMAT
    """Of its id; 0 if that is a hash of all settings, or if the file was written by hand."""
    begun_with: Mapping[str, str] | None = None
    """The maker that started the run, if `maker` resumed it with --reuse."""
    digest: str = ""
    """At format 0, of all settings: the name by which the next stage of its chain knows it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names by which the next stage of a chain may refer to this run."""
        if self.maker is None:
            return (self.config.id,)
        return (self.id, self.digest) if self.digest else (self.id,)

    def text(self) -> str:
        """The content of the file."""
        content = {
            "id": self.id,
            "format": self.format,
            "kind": self.kind,
            **({} if self.maker is None else {"made_with": self.maker.made_with()}),
            **({} if self.begun_with is None else {"begun_with": dict(self.begun_with)}),
            **self.config.model_dump(mode="json", exclude={"runs"}),
        }
        return signed(as_yaml(content))


def signed(text: str) -> str:
    """`text` with its digest as the last line."""
    return f"{text}{_DIGEST}{hashlib.sha256(text.encode()).hexdigest()}\n"


def read(folder: Path) -> RunFile | None:
    """What the `run.yaml` of a run holds; None if it is missing or damaged."""
    try:
        return load(folder)
    except InputError:
        return None


def load(folder: Path) -> RunFile:
    """What the `run.yaml` of a run holds. Raises InputError, one line, if it is missing or damaged."""
    try:
        return remembered(_load, folder / NAME)
    except FileNotFoundError:
        raise InputError(f"{folder}: {unreadable(folder)}") from None


def _load(file: Path) -> RunFile:
    text = read_bytes(file).decode(errors="replace")
    try:
        content = parse_yaml(text)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file.parent}: {DAMAGED}")
    settings = {key: value for key, value in content.items() if key not in WRITTEN}
    if "made_with" not in content:
        return _by_hand(file, content.get("id"), settings)
    try:
        maker = Maker.of(content["made_with"], file.parent)
        if "digest" in content:
            whole = text == signed(text.rpartition(_DIGEST)[0])
            run = RunFile(
                *(content["id"], RunConfig.model_validate(_WITHOUT | settings), maker),
                *(content["kind"], content["format"], content.get("begun_with")),
            )
        else:
            whole = _is_older_id(content["id"], settings, content["made_with"])
            run = _older(content["id"], settings, maker)
    except (KeyError, TypeError, AttributeError, ValidationError):
        whole = False
    if not whole:  # else it would resume as a run with other settings than its id stands for
        raise InputError(f"{file.parent}: {DAMAGED}")
    return run


def _by_hand(file: Path, name: Any, settings: Mapping[str, Any]) -> RunFile:
    if "vary" in settings:
        raise InputError(f"{file}: has `vary:`, so it is an experiment and not one run")
    if not name:
        raise InputError(f"{file}: has no `id:`; `rankwise train CONFIG.yaml` makes such folders")
    config = run_config(settings)
    return RunFile(str(name), config, None, config.kind, format=0)


def _older(name: Any, settings: Mapping[str, Any], maker: Maker) -> RunFile:
    """A file from before it held a digest."""
    # at that time only runs with a tuned rate were evaluated just once, at the end
    config = RunConfig.model_validate({"tuned": settings.get("eval_every") == 0, **_WITHOUT, **settings})
    return RunFile(str(name), config, maker, config.kind, format=0, digest=_digest(settings))


def _is_older_id(name: Any, settings: Mapping[str, Any], made_with: Mapping[str, Any]) -> bool:
    """Whether `name` is the hash of all settings, with version and data or without, that it was before format 1."""
    older = [settings, made_with["rankwise"], made_with["data"]]
    return str(name) in (_digest(settings)[:12], _digest(older)[:12])


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def at_home(folder: Path) -> bool:
    """Whether a folder is named after the id in its `run.yaml`, of this format. Reads the first lines only."""
    start = f"id: {folder.name.rpartition('-')[2]}\nformat: {FORMAT}\n".encode()
    with suppress(OSError, InputError), opened(folder / NAME) as file:
        return file.read(len(start)) == start
    return False


def maker_of(file: Path) -> Maker | None:
    """What made the run whose `run.yaml` this file is, copied or not; None for a file that the user wrote."""
    noted = read_yaml(file).get("made_with")
    try:
        return None if noted is None else Maker.of(noted, file.parent)
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{file}: made_with: not as rankwise writes it; leave it out, and id with it") from None


def unreadable(folder: Path) -> str:
    """Why a `run.yaml` cannot be read; "" if it can."""
    try:
        read_bytes(folder / NAME)
    except FileNotFoundError:
        return "there is no run.yaml in it, so it is not known which run it was"
    except InputError as error:
        return str(error).replace(f"{folder}/", "")
    return ""


def apart(one: RunFile, other: RunFile) -> list[str]:
    """Why two runs are not compared with each other, for `in_words`; [] if they may be."""
    if one.maker is None or other.maker is None:
        return [] if one.maker is other.maker else [CODE]
    for first, later in ((one, other), (other, one)):
        if later.config.after in first.names and later.maker.before not in ("", first.maker.name):  # type: ignore[union-attr]
            return [BEFORE]
    data = [(each.config.task, each.kind == "trial") for each in (one, other)]
    return one.maker.apart(other.maker, same_data=data[0] == data[1])
