"""What must be known to use an adapter, in `use.json` next to its weights; PEFT does not look at it.

It has what PEFT's own files lack: the task with its columns, the names of the classes, how texts become tokens, and a
digest of the base weights, so that an adapter is not put on others unnoticed.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rankwise.errors import InputError, nearest
from rankwise.files import USE, read_json
from rankwise.named import written
from rankwise.runs.kinds import Count, Text
from rankwise.runs.record import damaged
from rankwise.settings import RunConfig, run_config

FORMAT = 1
SETTINGS = (
    *("task", "model", "trust_remote_code", "dtype", "autocast", "quantise", "attention"),
    *("max_length", "batch_size", "eval_rows", "seed"),
)
"""Settings of a run that decide how its adapter is used."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """What must be known to use an adapter.

    Attributes:
        settings: those of SETTINGS that differ from their defaults, as in a configuration file, without absolute paths
            of data. A model that was given as a path keeps that path.
        labels: names of the classes in the order of the model's outputs; empty without classes.
        asks: the columns that a row must have to get an answer.
        form: what an answer is: `class`, `value`, `target` (a text, which a decoder writes after an end token), `chat`
            (a turn, by the chat template of the tokenizer) or `` for none.
        metric: the main metric.
        base: digest of the base weights that it was trained on (`adapters.beside`); "" if not known.
        format: of the file.
    """

    settings: Mapping[Text, Any]
    labels: Sequence[Text] = ()
    asks: Sequence[Text] = ()
    form: Text = ""
    metric: Text = ""
    base: Text = ""
    format: Count = FORMAT

    @classmethod
    def of(cls, config: RunConfig, task: Any, base: str, rows: int | None = None) -> "Use":
        """Of a run of `task`, a `tasks.Task`, on base weights with the digest `base`.

        `rows` go through its model at once.
        """
        settings = config.model_dump(mode="json", include={*SETTINGS}, exclude_defaults=True)
        if rows is not None:
            settings["batch_size"] = rows
        return cls(
            settings={**settings, "task": elsewhere(settings["task"])},
            labels=[*task.labels],
            asks=[*task.asked.values()],
            form=task.form,
            metric=task.main,
            base=base,
        )

    @classmethod
    def of_task(cls, task: Any, model: str | None = None, base: str = "", **settings: Any) -> "Use":
        """For an adapter from a loop of your own: `rw.Use.of_task(task, max_length=64)`.

        Args:
            task: what `rw.task` gives.
            model: name or folder of the base model; the embedded one when absent.
            base: what `rw.base_digest(model, head)` gave before a method was attached. The adapter is then refused on
                other base weights, and also on the same ones where the loop had them in another form (`dtype`,
                `quantise`, a larger vocabulary) than `settings` say. Without it any base whose layers fit is taken.
            settings: others of SETTINGS that differ from their defaults.

        Raises:
            InputError: a setting that does not exist, or that has nothing to do with use.
        """
        if unknown := [key for key in settings if key not in SETTINGS]:
            raise InputError(
                f"{unknown[0]}: is not among the settings saved next to an adapter{nearest(unknown[0], SETTINGS)}; "
                f"these are {', '.join(SETTINGS)}"
            )
        return cls.of(run_config({"task": written(task), "model": model, **settings}), task, base)

    def command(self, folder: Path) -> str:
        """A command to paste into a shell: it asks what is in `folder` once, or scores it where it has no answers."""
        if not self.asks:
            return f"rankwise evaluate {shlex.quote(str(folder))}"
        text = "a text of your own"
        turns = [{"role": "user", "content": text}]
        row = {column: turns if column in ("messages", "conversations") else text for column in self.asks}
        asked = shlex.quote(json.dumps(row, ensure_ascii=False))
        return f"echo {asked} | rankwise predict {shlex.quote(str(folder))}"

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, sort_keys=True)
        (folder / USE).write_text(f"{text}\n", encoding="utf-8")


_USE = TypeAdapter(Use)


def read(folder: Path) -> Use | None:
    """What is saved next to an adapter; None if there is no such file. InputError for a damaged or newer one."""
    try:
        content = read_json(folder / USE)
    except FileNotFoundError:
        return None
    if isinstance(content, dict) and isinstance(number := content.get("format"), int) and number > FORMAT:
        raise InputError(f"{folder / USE}: was written by a newer rankwise: pip install -U rankwise")
    try:
        return _USE.validate_python(content)
    except ValidationError as error:
        raise damaged(folder / USE, error) from None


def elsewhere(task: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a task without the absolute paths of files, which say nothing on another machine.

    Of a chat template the name stays: the tokenizer next to an adapter has its text.
    """
    paths = {key for key in ("dataset", "template") if key in task and Path(task[key]).expanduser().is_absolute()}
    names = {"template": Path(task["template"]).name} if "template" in paths else {}
    return {**{key: value for key, value in task.items() if key not in paths}, **names}
