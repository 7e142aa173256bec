"""One HTML page for a folder of runs: no network, pictures inside, and one script, which sorts and opens.

The page is made from the files of the runs alone, finished or not, so it can be written at any time of a sweep. It is
readable without its script, and its policy lets no other script run, whatever the runs may hold.
"""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rankwise
from rankwise.errors import InputError, need
from rankwise.files import read_json, write_whole
from rankwise.metrics import with_direction
from rankwise.report import examples, figures
from rankwise.report.answers import Answered, answered
from rankwise.report.data import Data, data
from rankwise.report.examples import Example
from rankwise.report.figures import Picture, RankCourse
from rankwise.report.pages import Page, anchor, pages
from rankwise.results import columns, published
from rankwise.results.columns import Column, Head
from rankwise.results.formats import plus_minus, word
from rankwise.results.notes import always, scored_on
from rankwise.results.rows import Average, Row
from rankwise.results.seen import Lines
from rankwise.results.stats import mean, sd
from rankwise.results.summary import Summary
from rankwise.runs.answers import WRONG
from rankwise.runs.result import Finished
from rankwise.runs.store import Store
from rankwise.settings import flattened

TEMPLATE = Path(__file__).with_name("template.html")
SCRIPT = Path(__file__).with_name("page.js")


@dataclass(frozen=True)
class Cell:
    """What a cell shows, the number it is sorted by (None: by its text), and links after the text: (words, anchor)."""

    text: str
    number: float | None = None
    links: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Grid:
    """A table: heads and the cells below them."""

    heads: Sequence[Head]
    rows: list[list[Cell]]
    caption: str = ""
    sortable: bool = True


@dataclass(frozen=True)
class TaskPart:
    """What the page has of one task.

    Attributes:
        name, split: its heading, and which rows were scored.
        best, cost, every, tried: tables: each method at its best rate, what that costs, all rates, and the rates tried.
        figures, pictures: pictures of all methods, and one that a method's runs left, with its label.
        data: what the models read: the rows of each split, those of each class, and more.
        examples, answered: what the methods wrote for the same rows, and which class they gave, by label.
        ranks: of methods whose ranks can move, where the rank went.
    """

    name: str
    split: str
    best: Grid
    cost: Grid
    every: Grid | None
    tried: Sequence[Grid]
    figures: Sequence[Picture]
    data: Sequence[tuple[Grid, Grid | None, Data]]
    examples: Sequence[Example]
    answered: Sequence[tuple[str, Answered]]
    pictures: Sequence[tuple[str, Picture]]
    ranks: Sequence[RankCourse]


def write(runs: Path | str | Store, out: Path | str | None = None, summary: Summary | None = None) -> Path:
    """Write the report of a folder of `runs` to `out`, by default `report.html` in it, and return where it is.

    `summary`: of all finished runs, if it has been computed already. Raises InputError for a folder without runs, and
    if a package of the extra `bench` is missing.
    """
    jinja2 = need("jinja2", "bench")
    store = runs if isinstance(runs, Store) else Store(runs)
    folder, folders = store.folder, store.folders()
    if not folders:
        raise InputError(f"{folder}: holds no run; start some with rankwise compare EXPERIMENT.yaml runs={folder}")
    summary = summary or Summary.of_store(store, folders)
    about = summary.experiment.get("report") or {}
    sections = pages(store, folders, summary.results, summary.rows)
    script = SCRIPT.read_text(encoding="utf-8")
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        title=about.get("title") or f"Runs in {store.name}",
        text=[paragraph for paragraph in (about.get("text") or "").split("\n\n") if paragraph.strip()],
        counts=_counts(sections),
        failed=[run for run in sections if run.state == "failed"],
        unfinished=[run for run in sections if run.state not in ("done", "failed")],
        verdicts=summary.verdicts,
        notes=[*([summary.damage] if summary.damage else []), *summary.notes],
        published=_published(summary),
        overview=_overview(summary),
        tasks=[_task(name, summary) for name in dict.fromkeys(row.task for row in summary.best)],
        columns=columns.columns(summary.rows) if summary.rows else [],
        settings=_settings(summary.results, summary.rows),
        environment=_environment([path for row in summary.rows for path in row.folders.values()]),
        runs=sections,
        version=rankwise.__version__,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    out = folder / "report.html" if out is None else Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # a name may hold what UTF-8 cannot, as names of files may
        write_whole(out, page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {(error.strerror or str(error)).lower()}") from None
    return out


def _published(summary: Summary) -> list[tuple[Grid, list[str]]]:
    """A table for each published one that the experiment names, and the notes below it."""
    heads = [Head(name, number=name not in ("printed row", "column", "ours", "note")) for name in published.HEADER]
    return [
        (Grid(heads, [[Cell(cell) for cell in row] for row in table.rows], table.title), table.notes)
        for table in published.compared(summary.beside)
    ]


def _counts(runs: Sequence[Page]) -> str:
    """How many runs there are, and the states of those that are not finished."""
    states = Counter(run.state for run in runs)
    done = states.pop("done", 0)
    rest = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f"{done} of {len(runs)} runs finished{f'; {rest}' if rest else ''}."


def _overview(summary: Summary) -> Grid | None:
    """Methods down, tasks across; only if there is more than one task."""
    best = summary.best
    tasks = list(dict.fromkeys(row.task for row in best))
    if len(tasks) < 2:
        return None
    by_place = {(row.method, row.task): row for row in best}
    firsts = [next(row for row in best if row.task == task) for task in tasks]
    heads = [Head("method", number=False)]
    heads += [Head(columns.task_name(row), f"{with_direction(row.score)}, {columns.MEAN_SD}") for row in firsts]
    rows = []
    for method in dict.fromkeys(row.method for row in best):
        cells = [by_place.get((method, task)) for task in tasks]
        scores = [Cell(plus_minus(row.mean, row.sd), row.mean) if row else Cell("") for row in cells]
        rows.append([Cell(method), *scores])
    benchmarks: dict[str, list[Average]] = {}
    for average in summary.averages:
        benchmarks.setdefault(average.benchmark, []).append(average)
    for benchmark, own in benchmarks.items():
        unit = f"mean of {len(own[0].tasks)} tasks, metrics of a task averaged first"
        if own[0].always is not None:
            unit = f"{unit}; {own[0].always:.3f} by the most frequent class of each"
        heads.append(Head(f"{benchmark} average", unit))
        by_method = {each.method: each.values for each in own}
        for line in rows:
            values = by_method.get(line[0].text, [])
            line.append(Cell(plus_minus(mean(values), sd(values)), mean(values)) if values else Cell(""))
    return Grid(heads, rows, "All tasks, each method at its best learning rate")


def _grid(rows: Sequence[Any], shown: Sequence[Column[Any]], caption: str) -> Grid:
    return Grid(shown, [[_cell(column, row) for column in shown] for row in rows], caption)


def _cell(column: Column[Any], row: Any) -> Cell:
    links = [(str(seed), anchor(path)) for seed, path in row.folders.items()] if column is columns.SEEDS else ()
    return Cell(column.cell(row), column.number_of(row), links)


def _task(name: str, summary: Summary) -> TaskPart:
    best = [row for row in summary.best if row.task == name]
    rows = [row for row in summary.rows if row.task == name]
    title = columns.task_name(best[0])
    scored = [*columns.who(rows), *columns.scores(rows), *columns.sizes(rows)]
    answers = [(row.method, answered(row.first, row.evaluated.name, WRONG)) for row in best]
    ranks = [figures.of_ranks(row) for row in best]
    return TaskPart(
        name=title,
        split="; ".join(filter(None, [scored_on(best[0]), always(best)])),
        best=_grid(best, scored, f"{title}: each method at its best learning rate"),
        cost=_grid(best, [*columns.who(best), *columns.COSTS], f"{title}: what a run of it costs"),
        every=_grid(rows, scored, f"{title}: every learning rate") if len(rows) > len(best) else None,
        tried=[
            _grid(lines, shown, f"{title}: learning rates tried, on rows that are not reported")
            for shown, lines in columns.tried(best)
        ],
        figures=figures.of_task(best, rows, title),
        data=[(_lines(each.splits), each.classes and _lines(each.classes), each) for each in data(best)],
        examples=examples.examples(best),
        answered=[(method, each) for method, each in answers if each],
        pictures=[
            (method, Picture.png(png, f"what {method} makes of some images")) for method, png in examples.pictures(best)
        ],
        ranks=[each for each in ranks if each is not None],
    )


def _lines(lines: Lines) -> Grid:
    heads = [Head(head, number=bool(place)) for place, head in enumerate(lines[0])]
    return Grid(heads, [[*map(Cell, row)] for row in lines[1]], sortable=False)


def _settings(results: Sequence[Finished], rows: Sequence[Row]) -> Grid:
    """Every setting with its value, or its values where runs differ; then the options of each method."""
    elsewhere = ("method", "after", "followed")
    keys = list(dict.fromkeys(key for result in results for key in result.config if key not in elsewhere))
    lines = []
    for key in keys:
        # where no model is set, the name of the embedded one
        values = [result.model if key == "model" else result.config.get(key) for result in results]
        lines.append((key, _values(values)))
    for row in {row.method: row for row in rows}.values():
        options = ", ".join(f"{key}={word(value)}" for key, value in row.options.items())
        lines.append((f"options of {row.method}", options or "none"))
    return _pairs("setting", "value", lines)


def _environment(folders: Sequence[Path]) -> Grid:
    contents = []
    for folder in folders:
        try:
            contents.append(read_json(folder / "env.json"))
        except (OSError, InputError):
            continue
    flat = [flattened(each, " ") for each in contents if isinstance(each, dict)]
    keys = dict.fromkeys(key for each in flat for key in each)
    return _pairs("what", "value", [(key, _values(each.get(key) for each in flat)) for key in keys])


def _pairs(left: str, right: str, lines: Sequence[tuple[str, str]]) -> Grid:
    heads = [Head(left, number=False), Head(right, number=False)]
    return Grid(heads, [[Cell(key), Cell(value)] for key, value in lines], sortable=False)


def _values(values: Iterable[Any]) -> str:
    """One value, or the different ones in their order, smallest number first."""
    distinct = list({json.dumps(value): value for value in values}.values())
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct):
        distinct.sort()
    return " | ".join(word(value) for value in distinct)
