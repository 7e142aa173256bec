"""The results of a set of runs, computed once for terminal, JSON and page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from rankwise.errors import InputError
from rankwise.metrics import METRICS
from rankwise.named import load_installed, load_plugin
from rankwise.results import columns, published
from rankwise.results.beside import Beside, beside
from rankwise.results.contrasts import Contrast, contrasts
from rankwise.results.formats import plain, plus_minus, span_over
from rankwise.results.notes import always, notes, scored_on
from rankwise.results.rows import Average, Row, averages, best, summarise
from rankwise.results.stats import mean, sd
from rankwise.runs.result import Finished
from rankwise.runs.store import Store

LORA = {"name": "lora"}


@dataclass(frozen=True)
class Summary:
    """What a set of runs says, each part computed when it is first asked for, and once.

    Attributes:
        results: the finished runs, as `Store.results` gives them.
        experiment: the description of the experiment, as `Store.experiment` gives it.
        left_out: which finished runs are not in here and why, in a sentence; "" for none.
        damage: why nothing is known of the experiment; "" if it is known or there is none.
    """

    results: Sequence[Finished]
    experiment: Mapping[str, Any] = field(default_factory=dict)
    left_out: str = ""
    damage: str = ""

    @classmethod
    def of_store(cls, store: Store, folders: Sequence[Path] | None = None, /, **more: Any) -> Self:
        """Of the finished runs of a folder, or of those in `folders`.

        An experiment that names an unknown table counts as damaged: its runs are shown without published numbers.
        A plugin whose metric scores a run is loaded, because the metric says which scores are better; InputError if it
        cannot be loaded. `more`: the fields that a subclass adds.
        """
        experiment, damage = store.described()
        results = store.results(folders)
        _load_metrics(store, results)
        summary = cls(results, experiment, store.left_out(folders), damage, **more)
        try:
            summary.beside  # noqa: B018  # computed here, and kept
        except InputError as error:
            rest = {key: value for key, value in experiment.items() if key != "published"}
            return replace(summary, experiment=rest, damage=str(error))
        return summary

    @cached_property
    def rows(self) -> list[Row]:
        """One row for each task, method and learning rate: mean, spread and interval of its score, parameters, cost."""
        return summarise(self.results)

    @cached_property
    def best(self) -> list[Row]:
        """Of `rows` the one to report for each task and method."""
        return best(self.rows)

    @property
    def reference(self) -> Mapping[str, Any]:
        """What methods are measured against, by its name and some options: what the experiment names, or plain LoRA."""
        return (self.experiment.get("report") or {}).get("reference") or LORA

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """Each of the best rows against the reference."""
        return contrasts(self.best, self.reference)

    @cached_property
    def averages(self) -> list[Average]:
        """Of each benchmark, over its tasks."""
        return averages(self.best)

    @cached_property
    def beside(self) -> list[Beside]:
        """Our results next to the tables that the experiment names. Raises InputError for an unknown table."""
        return beside(self.rows, self.best, self.experiment)

    @cached_property
    def notes(self) -> list[str]:
        """What to know before quoting a number, a sentence each."""
        before = [self.left_out] if self.left_out else []
        return [*before, *notes(self.rows, self.best, self.contrasts, self.reference)]

    @property
    def verdicts(self) -> list[str]:
        """What may be said of the differences between the methods, a sentence each."""
        return [contrast.sentence() for contrast in self.contrasts]

    def text(self) -> str:
        """Tables of scores and of costs, verdicts and notes, as the terminal shows them."""
        parts = []
        for task in dict.fromkeys(row.task for row in self.best):
            rows = [row for row in self.best if row.task == task]
            head = f"{columns.task_name(rows[0])}: {scored_on(rows[0])}"
            parts.append("; ".join(filter(None, [head, always(rows)])))
            parts.append(columns.scores_on_terminal(rows))
            parts += [columns.on_terminal(*table) for table in columns.tried(rows)]
            parts.append(columns.on_terminal([columns.METHOD, *columns.COSTS], rows))
        parts += _averages(self.averages)
        if self.best:
            parts.append(columns.legend(self.best))
        parts += ["\n".join(sentences) for sentences in (self.verdicts, self.notes) if sentences]
        return "\n\n".join(filter(None, [*parts, published.text(self.beside)]))

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "rows": [row.as_json() for row in self.rows],
            "best": [row.as_json() for row in self.best],
            "averages": [asdict(each) for each in self.averages],
            "differences": [each.as_json() for each in self.contrasts],
            "findings": self.verdicts,
            "notes": self.notes,
            **({"published": [asdict(cell) for cell in self.beside]} if self.beside else {}),
        }


def _load_metrics(store: Store, results: Sequence[Finished]) -> None:
    for result in results:
        if result.score and result.score not in METRICS:
            load_installed()
            for file in store.config(result.folder).plugins:
                try:
                    load_plugin(file)
                except InputError as error:
                    raise InputError(f"{result.folder}: its score is {result.score}, of a plugin: {error}") from None


def _averages(averages: Sequence[Average]) -> list[str]:
    """For each benchmark the tasks that its average covers, which may not be all of them, and a line per method."""
    parts = []
    for benchmark in dict.fromkeys(each.benchmark for each in averages):
        own = [each for each in averages if each.benchmark == benchmark]
        head = f"{benchmark}, average over {len(own[0].tasks)} tasks ({', '.join(own[0].tasks)})"
        if own[0].always is not None:
            head = f"{head}; always answering the most frequent class of each scores {own[0].always:.3f}"
        lines = [
            [
                each.method,
                str(len(each.values)),
                plus_minus(mean(each.values), sd(each.values)),
                span_over(each.interval, len(each.values)),
            ]
            for each in own
        ]
        parts += [head, plain(["method", "seeds", columns.MEAN_SD, "95 % interval"], lines)]
    return parts
