"""One HTML page for a folder of runs: no network, no script, pictures inside.

The page is made from the files of the runs alone, finished or not, so it can be written at any time of a sweep.
"""

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import rankwise
from rankwise.config import InputError, need
from rankwise.report import examples, plots, text
from rankwise.runs.files import read_lines, write_whole
from rankwise.runs.stats import mean, sd
from rankwise.runs.store import Store
from rankwise.runs.summary import Summary, plus_minus
from rankwise.runs.tables import Average, Row, averages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 60  # most points in one curve
TEMPLATE = Path(__file__).with_name("template.html")


@dataclass(frozen=True)
class Picture:
    """A figure as the address of an image that holds all its data, and the words for whoever cannot see it."""

    source: str
    alt: str

    @classmethod
    def of(cls, figure: "Figure", alt: str) -> "Picture":
        return cls._of(plots.svg(figure).encode(), "svg+xml", alt)

    @classmethod
    def png(cls, content: bytes, alt: str) -> "Picture":
        return cls._of(content, "png", alt)

    @classmethod
    def _of(cls, content: bytes, kind: str, alt: str) -> "Picture":
        return cls(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", alt)


@dataclass(frozen=True)
class Grid:
    """A table: columns and the cells below them."""

    columns: Sequence[text.Column]
    rows: list[list[str]]
    caption: str = ""


def write(folder: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of the runs in `folder` to `out`, by default `folder/report.html`, and return where it is.

    Raises InputError for a folder without runs, and where a package of the extra `bench` is missing.
    """
    from rankwise.metrics.classification import METRICS

    jinja2 = need("jinja2", "bench")
    store = Store(folder)
    folders = store.folders()
    if not folders:
        raise InputError(f"{folder}: holds no run; start some with rankwise compare EXPERIMENT.yaml runs={folder}")
    results = store.results()
    summary = Summary.of(results, METRICS)
    about = store.experiment().get("report") or {}
    unfinished = _unfinished(store, folders)
    page = {
        "title": about.get("title") or f"Runs in {Path(folder).resolve().name}",
        "text": [paragraph for paragraph in (about.get("text") or "").split("\n\n") if paragraph.strip()],
        "counts": f"{len(results)} of {len(folders)} runs finished.",
        "unfinished": unfinished,
        "findings": summary.findings(),
        "notes": summary.notes(),
        "overview": _overview(summary.best),
        "tasks": [_task(name, summary, store) for name in dict.fromkeys(row["task"] for row in summary.best)],
        "columns": [column for column in text.columns(summary.rows) if column.meaning] if summary.rows else [],
        "settings": _settings(results, summary.rows),
        "environment": _environment([path for row in summary.rows for path in row["folders"].values()]),
        "version": rankwise.__version__,
    }
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    out = Path(folder) / "report.html" if out is None else Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, template.render(page))
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {(error.strerror or str(error)).lower()}") from None
    return out


def _unfinished(store: Store, folders: Sequence[Path]) -> list[dict[str, str]]:
    found = []
    for folder in folders:
        standing = store.standing(folder)
        if standing.state == "done":
            continue
        message = standing.error
        if not message and standing.steps:
            message = f"step {standing.step} of {standing.steps}"
        try:
            config = store.config(folder)
            label = f"{config.task['name']}, {config.method['name']}, rate {config.learning_rate:g}, seed {config.seed}"
        except InputError:
            label = folder.name
        found.append({"label": label, "state": standing.state, "message": message})
    return found


def _overview(best: Sequence[Row]) -> Grid | None:
    """Methods down, tasks across; only where there is more than one task."""
    tasks = list(dict.fromkeys(row["task"] for row in best))
    if len(tasks) < 2:
        return None
    by_place = {(row["method"], row["task"]): row for row in best}
    heads = [next(row for row in best if row["task"] == task) for task in tasks]
    columns = [text.Column("method", str, number=False)]
    columns += [text.Column(text.task_name(row), str, unit=f"{row['score']}, mean ± sd") for row in heads]
    rows = []
    for method in dict.fromkeys(row["method"] for row in best):
        cells = [by_place.get((method, task)) for task in tasks]
        rows.append([method, *(plus_minus(row["mean"], row["sd"]) if row else "" for row in cells)])
    for benchmark, own in _averages(best).items():
        unit = f"mean of {len(own[0].tasks)} tasks, metrics of a task drawn together"
        columns.append(text.Column(f"{benchmark} average", str, unit=unit))
        by_method = {each.method: list(each.scores.values()) for each in own}
        for row in rows:
            values = by_method.get(row[0], [])
            row.append(plus_minus(mean(values), sd(values)) if values else "")
    return Grid(columns, rows, "All tasks, each method at its best learning rate")


def _averages(best: Sequence[Row]) -> dict[str, list[Average]]:
    found: dict[str, list[Average]] = {}
    for each in averages(best):
        found.setdefault(each.benchmark, []).append(each)
    return found


def _grid(rows: Sequence[Row], columns: Sequence[text.Column], caption: str) -> Grid:
    return Grid(columns, [[column.cell(row) for column in columns] for row in rows], caption)


def _task(name: str, summary: Summary, store: Store) -> dict[str, Any]:
    best = [row for row in summary.best if row["task"] == name]
    rows = [row for row in summary.rows if row["task"] == name]
    title = text.task_name(best[0])
    scored = [*text.who(rows), *text.scores(rows), *text.SIZES]
    shown = examples.pictures(best)
    return {
        "name": title,
        "split": f"{best[0]['score'] or 'not scored'} on {best[0]['rows']:,} rows of {best[0]['split']}",
        "best": _grid(best, scored, f"{title}: each method at its best learning rate"),
        "cost": _grid(best, [*text.who(best), *text.COSTS], f"{title}: what a run of it costs"),
        "every": _grid(rows, scored, f"{title}: every learning rate") if len(rows) > len(best) else None,
        "figures": [*_score_figure(best, title), *_curve_figures(best, title)],
        "examples": examples.examples(best),
        "pictures": [(method, Picture.png(png, f"what {method} makes of some images")) for method, png in shown],
        "ranks": [found for row in best if (found := _ranks(row)) is not None],
    }


def _score_figure(best: Sequence[Row], title: str) -> list[Picture]:
    scored = [row for row in best if row["mean"] is not None]
    if not scored:
        return []
    points = [
        plots.Point(
            row["method"],
            row["final"],
            row["mean"],
            (row["interval"][1] - row["interval"][0]) / 2 if row["interval"] else 0.0,
        )
        for row in scored
    ]
    several = any(point.error for point in points)
    bars = "bars: 95 % t-interval of the mean over seeds" if several else "one seed: no bars"
    figure = plots.score_by_parameters(points, scored[0]["score"], bars, f"{title}: score against size")
    words = "; ".join(f"{row['method']}: {plus_minus(row['mean'], row['sd'])}" for row in scored)
    return [Picture.of(figure, f"Score against the parameters kept. {words}")]


def _curve_figures(best: Sequence[Row], title: str) -> list[Picture]:
    lines = {row["method"]: [read_lines(path / "metrics.jsonl") for path in _folders(row).values()] for row in best}
    evaluations = [line["eval"] for runs in lines.values() for run in runs for line in run if "eval" in line]
    names = dict.fromkeys(name for scores in evaluations for name in scores)
    wanted: list[tuple[str, str, Callable[[Mapping[str, Any]], Any]]] = [
        ("training loss", "training loss", lambda line: line.get("loss"))
    ]
    for name in names:
        shown = "evaluation loss" if name == "loss" else name
        wanted.append((f"{shown} during training", shown, _evaluated(name)))
    figures = []
    for what, label, value in wanted:
        drawn = []
        for row in best:
            curves = [_curve(run, value) for run in lines[row["method"]]]
            drawn.append(plots.Line(f"{row['method']}, rate {row['learning_rate']:g}", curves))
        if any(len(steps) > 1 for line in drawn for steps, _ in line.curves):  # a point is no course
            figure = plots.curves(drawn, label, f"{title}: {what}")
            figures.append(Picture.of(figure, f"{what} by optimizer step, a line per method"))
    return figures


def _evaluated(name: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda line: line.get("eval", {}).get(name)


def _curve(
    lines: Iterable[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], Any]
) -> tuple[list[float], list[float]]:
    """Steps and values, drawn together where there are so many that noise would hide the course."""
    found = [(line["step"], value(line)) for line in lines if value(line) is not None]
    size = -(-len(found) // POINTS) or 1
    groups = [found[start : start + size] for start in range(0, len(found), size)]
    return [group[-1][0] for group in groups], [fmean(each for _, each in group) for group in groups]


def _folders(row: Row) -> dict[int, Path]:
    return {seed: Path(folder) for seed, folder in row["folders"].items()}


def _ranks(row: Row) -> dict[str, Any] | None:
    """Words and pictures of where the rank went; None for a method without sites or whose ranks cannot move."""
    histories = {seed: _history(folder) for seed, folder in _folders(row).items()}
    seed = min((seed for seed, history in histories.items() if history), default=None)
    if seed is None or not any(len(_changes(history)) > 1 or _searched(row, seed) for history in histories.values()):
        return None
    history = _changes(histories[seed])
    steps = max((line["step"] for line in read_lines(_folders(row)[seed] / "metrics.jsonl")), default=history[-1][0])
    final = history[-1][1]
    empty = sum(rank == 0 for rank in final.values())
    words = f"Seed {seed}, learning rate {row['learning_rate']:g}. "
    if len(history) == 1:
        words += f"The search found no reason to move: all ranks stayed as they were ({_range(final)})."
        return {"label": row["method"], "text": words, "figures": []}
    words += f"{_plural(len(history) - 1, 'change')}; at the end ranks of {_range(final)}"
    words += f", {_plural(empty, 'site')} empty." if empty else "."
    ends = [_changes(each)[-1][1] for each in histories.values() if each]
    if len(ends) > 1:
        moved = [site for site, rank in history[0][1].items() if any(end.get(site) != rank for end in ends)]
        same = sum(len({end.get(site) for end in ends}) == 1 for site in moved)
        words += (
            f" Over {len(ends)} seeds, {len(moved)} of {len(final)} sites end away from their first rank in some seed;"
            f" all seeds agree at {same} of these."
        )
    label = f"{row['method']}, seed {seed}"
    course = plots.ranks_over_time(history, steps, f"Ranks over time: {label}")
    top = max(rank for _, ranks in history for rank in ranks.values())
    end = plots.rank_picture(final, title=f"Final ranks: {label}", top=top)
    listed = ", ".join(f"{site} {rank}" for site, rank in final.items())
    figures = [Picture.of(course, f"Rank of each site by step. {words}"), Picture.of(end, f"Final ranks: {listed}")]
    return {"label": row["method"], "text": words, "figures": figures}


def _history(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / "ranks.jsonl") if line.get("ranks")]


def _searched(row: Row, seed: int) -> bool:
    """Whether the method looked for ranks at all: a search writes its weights along with the ranks."""
    return any("weights" in line for line in _history(_folders(row)[seed]))


def _changes(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[str, int]]]:
    """(step, ranks) at the start and wherever the ranks are not those of the line before."""
    kept: list[tuple[int, dict[str, int]]] = []
    for line in history:
        if not kept or line["ranks"] != kept[-1][1]:
            kept.append((line["step"], line["ranks"]))
    return kept


def _range(ranks: Mapping[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    return f"{low}" if low == high else f"{low} to {high}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _settings(results: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> Grid:
    """Every setting with its value, or its values where runs differ; then the options of each method."""
    aside = ("method", "after", "followed")
    keys = list(dict.fromkeys(key for result in results for key in result["config"] if key not in aside))
    lines = []
    for key in keys:
        # a model that is not set has a name all the same: that of the embedded one
        place = [result if key == "model" else result["config"] for result in results]
        lines.append([key, _values(each.get(key) for each in place)])
    for row in {row["method"]: row for row in rows}.values():
        options = ", ".join(f"{key}={_word(value)}" for key, value in row["options"].items())
        lines.append([f"options of {row['method']}", options or "none"])
    return Grid([text.Column("setting", str, number=False), text.Column("value", str, number=False)], lines)


def _environment(folders: Sequence[Path]) -> Grid:
    found = []
    for folder in folders:
        try:
            found.append(json.loads((folder / "env.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    flat = [dict(_flat(each)) for each in found if isinstance(each, dict)]
    keys = dict.fromkeys(key for each in flat for key in each)
    lines = [[key, _values(each.get(key) for each in flat)] for key in keys]
    return Grid([text.Column("what", str, number=False), text.Column("value", str, number=False)], lines)


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", value


def _values(values: Iterable[Any]) -> str:
    """One value, or the different ones in their order, smallest number first."""
    distinct = list({json.dumps(value): value for value in values}.values())
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct):
        distinct.sort()
    return " | ".join(_word(value) for value in distinct)


def _word(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
