"""Results as rows: averaged over seeds, one per task, method and learning rate, and the best rate of each method."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from rankwise.metrics import METRICS, worth
from rankwise.metrics.metric import CORRELATION, Interval
from rankwise.results.labels import CHAIN, labels, natural
from rankwise.results.stats import equal, mean, sd, t_interval
from rankwise.results.tuning import Contests, Tuned
from rankwise.runs.answers import Answers
from rankwise.runs.result import Finished, Split
from rankwise.runs.search import Search
from rankwise.settings import OWN

_COMPUTING = {"micro_batch", "packing", "activation_memory", "fast"}  # change the order of sums, not what is summed
_MAY_DIFFER = {"method", *OWN["method"], "budget", "seed", "eval_every", "checkpoint_every", *_COMPUTING, *CHAIN}
"""Settings in which a method may differ from the one that it is measured against."""


@dataclass(frozen=True)
class Score:
    """A metric over the seeds: its mean and sample standard deviation, which is None for one seed."""

    mean: float
    sd: float | None


@dataclass(frozen=True)
class Always:
    """The score of always answering the most frequent class. `tied`: other classes that are as frequent."""

    answer: str
    score: float
    tied: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        content: dict[str, Any] = {"class": self.answer, "score": self.score}
        return {**content, "tied": list(self.tied)} if self.tied else content


@dataclass(frozen=True, kw_only=True)
class Row:
    """The results of one task, method and learning rate, averaged over their seeds.

    Attributes:
        task, task_options: the task's label, and its settings as JSON.
        method, name, options: the label in tables, the name of the method alone, and its options.
        model, scale: the model's name; smoke, small or full.
        setting: as JSON, what has to be equal for methods to be compared, the runs before in a chain included.
        warmup, learning_rate: as set.
        score, scores: name of the main metric, "" without labels, and its value by seed.
        metrics: all metrics by name.
        benchmark, counted: the benchmark that the task belongs to, or "", and by seed what counts in its average.
        counted_always: what would count there if the answer were always the most frequent class, or None.
        always: what that scores on the main split, or None.
        share: of the most frequent answer to the main split, mean over the seeds, or None.
        budget, trainable, final, head: parameters of the size given, at the peak, at the end; the head's are in none of
            these.
        asked: the parameters that `budget:` allows, None without one or where the method has no size to choose.
        seconds, examples_per_second, peak_memory, adapter_bytes: means over the seeds; memory in bytes.
        evaluated, trained: the rows of the main evaluation split and of training.
        searches: by seed, the outcome of the search of a method that learns ranks.
        remarks: notes of the runs themselves.
        tuned: how the learning rate was chosen, None if it was not.
        folders: the folder of each seed's run.
    """

    task: str
    task_options: str
    method: str
    name: str
    options: Mapping[str, Any]
    model: str
    scale: str
    setting: str
    warmup: float
    learning_rate: float
    score: str
    scores: Mapping[int, float]
    metrics: Mapping[str, Score]
    benchmark: str
    counted: Mapping[int, float]
    counted_always: float | None
    always: Always | None
    share: float | None
    budget: int
    trainable: int
    final: int
    head: int
    asked: int | None
    seconds: float
    examples_per_second: float
    peak_memory: int
    adapter_bytes: int
    evaluated: Split
    trained: Split
    searches: Mapping[int, Search]
    remarks: Sequence[str]
    tuned: Tuned | None
    folders: Mapping[int, Path]

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs."""
        return list(self.folders)

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.folders)

    @property
    def mean(self) -> float | None:
        """Of the main metric; None without a score."""
        return mean(list(self.scores.values())) if self.scores else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation of the main metric; None for fewer than two scores."""
        return sd(list(self.scores.values()))

    @cached_property
    def interval(self) -> Interval | None:
        """95 % t-interval of the mean, within the metric's range; None for one seed and where all are equal."""
        values = list(self.scores.values())
        limits = [METRICS[self.score].limits] if self.score in METRICS else []
        return None if equal(values) else t_interval(values, *limits)

    @property
    def trains(self) -> bool:
        """Whether anything trains."""
        return self.trainable + self.head > 0

    @property
    def used(self) -> float | None:
        """The peak as a share of the budget; None without one."""
        return None if self.asked is None else self.trainable / self.asked

    @property
    def first(self) -> Path:
        """The folder of the smallest seed."""
        return self.folders[min(self.folders)]

    def as_json(self) -> dict[str, Any]:
        """As plain data, without paths."""
        nested = ("setting", "metrics", "always", "evaluated", "trained", "searches", "remarks", "tuned", "folders")
        derived = ("seeds", "n", "mean", "sd", "interval", "used")
        return {
            **{each.name: getattr(self, each.name) for each in fields(self) if each.name not in nested},
            **{name: getattr(self, name) for name in derived},
            "metrics": {name: vars(score) for name, score in self.metrics.items()},
            "always": self.always and self.always.as_json(),
            "split": self.evaluated.name,
            **{key: getattr(self.evaluated, key) for key in ("rows", "official", "note", "own")},
            "train_split": self.trained.name,
            **{f"train_{key}": getattr(self.trained, key) for key in ("official", "note", "own")},
            "searches": {seed: vars(search) for seed, search in self.searches.items()},
            "remarks": list(self.remarks),
            "tuned": self.tuned and self.tuned.as_json(),
        }


def summarise(results: Sequence[Finished]) -> list[Row]:
    """One row per task, method and learning rate, averaged over its seeds. Takes what `Store.results` gives.

    Runs of a chain share a row where their whole chains are alike except for the seeds. Runs that only try a rate (of
    the kind `trial`) make no row; what they found is in `tuned` of the others.
    """
    reported = [result for result in results if result.kind != "trial"]
    contests = Contests([result for result in results if result.kind == "trial"])
    groups: dict[str, list[tuple[Finished, str]]] = {}
    for result, label in zip(reported, labels(reported), strict=True):
        settings = {key: value for key, value in result.config.items() if key not in {"seed", "method", *CHAIN}}
        what = [result.method, result.options, settings, result.lineage]
        groups.setdefault(json.dumps(what, sort_keys=True), []).append((result, label))
    rows = [_row([result for result, _ in group], group[0][1], contests) for group in groups.values()]
    return sorted(rows, key=lambda row: (row.task, row.name, natural(row.method), row.learning_rate))


def best(rows: Sequence[Row]) -> list[Row]:
    """Of each task and method the row of the learning rate with the best mean, or the one that tuning chose.

    Only the rates with the most seeds are candidates: a single lucky seed must not win over three.
    """
    chosen: dict[tuple[str, str], Row] = {}  # tasks may have one label, such as two files of one name
    for row in rows:
        key = (row.task_options, row.method)
        if key not in chosen or _rank(row) > _rank(chosen[key]):
            chosen[key] = row
    return list(chosen.values())


@dataclass(frozen=True)
class Average:
    """A benchmark's average of one method: the mean over tasks, each task's metrics averaged first.

    Attributes:
        scores: by seed, of the seeds that all tasks have.
        always: the same mean if the answer were always the most frequent class of each task; None where not known.
    """

    benchmark: str
    tasks: tuple[str, ...]
    method: str
    scores: dict[int, float]
    always: float | None

    @property
    def values(self) -> list[float]:
        """The scores alone."""
        return list(self.scores.values())

    @property
    def interval(self) -> Interval | None:
        """95 % t-interval of the mean over the seeds; None for one seed and where all seeds are equal."""
        return None if equal(self.values) else t_interval(self.values, CORRELATION)


def averages(chosen: Sequence[Row]) -> list[Average]:
    """Over the tasks of each benchmark, of the methods that have all of them; `chosen` is what `best` gives.

    Only for benchmarks of which there are at least two tasks.
    """
    results = []
    for benchmark in dict.fromkeys(row.benchmark for row in chosen if row.benchmark):
        rows = [row for row in chosen if row.benchmark == benchmark]
        tasks = tuple(dict.fromkeys(row.task for row in rows))
        for method in dict.fromkeys(row.method for row in rows):
            own = [row for row in rows if row.method == method]
            seeds = set.intersection(*(set(row.counted) for row in own))
            if len(tasks) > 1 and len(own) == len(tasks) and seeds:
                scores = {seed: mean([row.counted[seed] for row in own]) for seed in sorted(seeds)}
                always = [row.counted_always for row in own if row.counted_always is not None]
                results.append(
                    Average(benchmark, tasks, method, scores, mean(always) if len(always) == len(own) else None)
                )
    return results


def unofficial(row: Row) -> dict[str, str]:
    """The splits of a row, the training split included, that are not official ones: name -> why."""
    return {split.name: split.note for split in (row.evaluated, row.trained) if split.unofficial}


def _rank(row: Row) -> tuple[bool, int, float]:
    chosen = row.tuned is None or row.tuned.learning_rate == row.learning_rate
    return chosen, row.n, worth(row.score, row.mean)


def _row(members: Sequence[Finished], label: str, contests: Contests) -> Row:
    first = members[0]
    by_seed = {result.seed: result for result in sorted(members, key=lambda result: result.seed)}

    def values(name: str) -> dict[int, float]:
        return {seed: result.metrics[name] for seed, result in by_seed.items() if name in result.metrics}

    def average(part: str, key: str) -> float:
        return mean([getattr(getattr(result, part), key) for result in by_seed.values()])

    trainable = average("parameters", "trainable")
    main = [result.answers[0] for result in by_seed.values() if result.answers]
    remarks = list(dict.fromkeys(note for result in by_seed.values() for note in result.notes))
    return Row(
        task=first.task,
        task_options=json.dumps(first.config["task"], sort_keys=True),
        method=label,
        name=first.method,
        options=first.options,
        model=first.model,
        scale=first.config["scale"],
        setting=_setting(first),
        warmup=first.config["warmup"],
        learning_rate=first.learning_rate,
        score=first.score,
        scores=values(first.score),
        metrics={name: Score(mean(each), sd(each)) for name in first.metrics if (each := list(values(name).values()))},
        benchmark=first.benchmark.name if first.benchmark else "",
        counted={seed: result.benchmark.score for seed, result in by_seed.items() if result.benchmark},
        counted_always=first.benchmark.majority if first.benchmark else None,
        always=_always(main[0], first.score) if main else None,
        share=mean([each.share for each in main]) if main else None,
        budget=round(average("parameters", "budget") or trainable),  # what has no ranks may spend what it trains
        trainable=round(trainable),
        final=round(average("parameters", "final")),
        head=round(average("parameters", "head")),
        asked=first.config.get("budget"),
        seconds=average("cost", "seconds"),
        examples_per_second=average("cost", "examples_per_second"),
        peak_memory=round(average("cost", "peak_memory_bytes")),
        adapter_bytes=round(average("cost", "adapter_bytes")),
        evaluated=first.splits.evaluation[0],
        trained=first.splits.train,
        searches={seed: result.search for seed, result in by_seed.items() if result.search},
        remarks=[
            *remarks,
            *_nothing_learnt(by_seed, label),
            *(_memory(result, label) for result in by_seed.values() if _short(result)),
        ],
        tuned=contests.of(first),
        folders={seed: result.folder for seed, result in by_seed.items()},
    )


def _always(answers: Answers, score: str) -> Always | None:
    """None if there are no classes or the score is not known."""
    if not answers.majority or score not in answers.metrics:
        return None
    return Always(answers.majority, answers.metrics[score], answers.tied)


def _nothing_learnt(by_seed: Mapping[int, Finished], label: str) -> list[str]:
    """The runs that gave one answer to all rows of a split, the seeds of one sentence together."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for seed, result in by_seed.items():
        for each in result.answers:
            if each.nothing_learnt:
                seeds.setdefault((each.split, each.nothing_learnt), []).append(seed)
    return [
        f"{label}, {'seed' if len(own) == 1 else 'seeds'} {', '.join(map(str, own))}, on {split}: {sentence}"
        for (split, sentence), own in seeds.items()
    ]


def _setting(result: Finished) -> str:
    stages = [*result.lineage, result.config]
    return json.dumps(
        [{key: value for key, value in stage.items() if key not in _MAY_DIFFER} for stage in stages], sort_keys=True
    )


def _short(result: Finished) -> bool:
    """Whether a run has run out of memory: it took fewer rows at once than its settings say."""
    rows, most = result.cost.micro_batch, result.config.get("micro_batch")
    return rows is not None and (most is None or rows < most)


def _memory(result: Finished, label: str) -> str:
    rows, most = result.cost.micro_batch, result.config["batch_size"]
    what = f"packs at once, {most} rows" if result.config.get("packing") else f"rows at once, {most}"
    return f"seed {result.seed} of {label} ran out of memory and took {rows} {what} a step"
