"""Results as rows: seeds drawn together, the best learning rate of each method, and tables of plain text."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.errors import shown_line
from rankwise.metrics import METRICS
from rankwise.results.stats import equal, mean, sd, t_interval
from rankwise.runs.answers import nothing_learnt, spreads
from rankwise.runs.search import Search
from rankwise.settings import OWN

Row = dict[str, Any]

_CHAIN = {"after", "followed"}
"""Settings that say where in a chain a run stands, and with which seed; what the stage is, its other settings say."""
_SHOWN_APART = {"task", "method", "learning_rate", "seed", *_CHAIN}
"""Settings that a row shows in columns of their own, or draws together."""
_ASIDE = {"method", *OWN["method"], "budget", "seed", "eval_every", "checkpoint_every", *_CHAIN}
"""Settings in which a method may differ from the one that it is measured against."""
_PHASE = {"tuning", "eval_every"}
"""Settings in which a run that tries a rate differs from one that is reported, rate and seed aside."""


def summarise(results: Sequence[dict[str, Any]]) -> list[Row]:
    """One row per task, method and learning rate, its seeds drawn together. Takes what `Store.results` gives.

    Runs of a chain are drawn together where their whole chains are alike, the seeds aside.

    A row holds
      task (its label), task_options (as JSON), learning_rate; method (the label in tables), name (of the method alone),
      options; model, scale (smoke or full); seeds, n (how many);
      setting (as JSON: what has to be equal for methods to be compared, the runs before in a chain included), warmup;
      score (name of the main metric), scores (its value by seed), mean, sd (sample), interval (95 % t: low, high,
      within what the metric can be);
      metrics (name -> {mean, sd});
      benchmark (whose part the task is, or ""), counted (by seed, what counts in its average);
      counted_always: what would count there if the answer were the commonest class always, or None;
      always: what answering the commonest class of the main split always scores, {class, score}, or None;
      share: of the most frequent answer to the main split, mean over the seeds, or None;
      budget, trainable (at its peak), final, head: parameters, the head's in none but the last;
      asked: the parameters that `budget:` allows, None without one or where the method has no size to choose;
      used: trainable / asked, or None;
      tuned: how the learning rate was chosen, None where it was not (see `Tuned`);
      peak_memory, adapter_bytes (bytes), seconds, examples_per_second: means over the seeds;
      split, rows, official, note, own: what it was evaluated on;
      train_split, train_official, train_note, train_own: what it was trained on;
      searches: by seed, what the search of a method that learns ranks has come to (see `Search`);
      remarks: what the runs themselves say that a reader has to know;
      folders: the folder of each seed's run.
    mean, sd and interval are None where they are not defined: no labels, or one seed; the interval also where all seeds
    are equal, which says nothing of the spread.
    Runs that only try a rate (of the kind `trial`) make no row; what they found is in `tuned` of the others.
    """
    reported = [result for result in results if result["kind"] != "trial"]
    tried = _contests([result for result in results if result["kind"] == "trial"])
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in reported:
        settings = {key: value for key, value in result["config"].items() if key not in {"seed", "method", *_CHAIN}}
        what = [result["method"], result["options"], settings, result["lineage"]]
        groups.setdefault(json.dumps(what, sort_keys=True), []).append(result)
    labels = _labels(reported)
    rows = [
        {**_row(members, labels[_identity(members[0])]), "tuned": _tuned(tried, members[0])}
        for members in groups.values()
    ]
    return sorted(rows, key=lambda row: (row["task"], row["name"], _natural(row["method"]), row["learning_rate"]))


Tuned = dict[str, Any]
"""How a learning rate was chosen:

split, rows, note: what it was chosen on;
score: name of the metric; seeds: those at which rates were tried;
rates: the rates tried that trained to their end, the lowest first, each {learning_rate, scores (by seed), n, mean, sd};
learning_rate: the one that was chosen;
tied: other rates that scored the same at as many seeds;
edge: "lowest" or "highest" where it alone is the best and is that of the rates tried, or "".
"""


def tuned(results: Sequence[dict[str, Any]]) -> Tuned | None:
    """What runs say that differ in rate and seed alone; None where none of them has a score.

    Of the rates with the most seeds the one with the best mean is chosen, and the lowest of equals.
    """
    by_rate: dict[float, dict[int, float]] = {}
    for result in sorted(results, key=lambda result: (result["learning_rate"], result["seed"])):
        if result["score"] in result["metrics"]:
            by_rate.setdefault(result["learning_rate"], {})[result["seed"]] = result["metrics"][result["score"]]
    if not by_rate:
        return None
    rates = [
        {"learning_rate": rate, "scores": scores, "n": len(scores), "mean": mean(values), "sd": sd(values)}
        for rate, scores in by_rate.items()
        if (values := list(scores.values()))
    ]
    worth = max((each["n"], each["mean"]) for each in rates)
    chosen, *tied = [each["learning_rate"] for each in rates if (each["n"], each["mean"]) == worth]
    ends = {rates[-1]["learning_rate"]: "highest", rates[0]["learning_rate"]: "lowest"}
    evaluated = results[0]["splits"]["evaluation"][0]
    return {
        "split": evaluated["name"],
        "rows": evaluated["rows"],
        "note": evaluated["note"],
        "score": results[0]["score"],
        "seeds": sorted({seed for scores in by_rate.values() for seed in scores}),
        "rates": rates,
        "learning_rate": chosen,
        "tied": tied,
        "edge": "" if tied or len(rates) == 1 else ends.get(chosen, ""),
    }


def _contests(results: Sequence[dict[str, Any]]) -> dict[str, list[Tuned]]:
    """By combination what its tuning found: once, or once per share of the rows that was held out."""
    groups: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for result in results:
        groups.setdefault(_combination(result), {}).setdefault(result["config"]["tuning"], []).append(result)
    return {
        key: [found for members in by_share.values() if (found := tuned(members))] for key, by_share in groups.items()
    }


def _combination(result: dict[str, Any]) -> str:
    """What the tuning runs of a combination and those reported have in common."""
    aside = {"seed", "learning_rate", "method", *_PHASE, *_CHAIN}
    settings = {key: value for key, value in result["config"].items() if key not in aside}
    return json.dumps([result["method"], result["options"], settings], sort_keys=True)


def _tuned(tried: dict[str, list[Tuned]], result: dict[str, Any]) -> Tuned | None:
    """How the rate of a reported run was chosen: by the tuning that chose it, if one did."""
    if not result["tuned"]:
        return None
    found = tried.get(_combination(result), [])
    return next((each for each in found if each["learning_rate"] == result["learning_rate"]), next(iter(found), None))


def _natural(label: str) -> list[tuple[float, str]]:
    """For sorting: numbers by their size, so that sparsity=10.0 comes after sparsity=3.0."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", label)
    return [(float(part), "") if place % 2 else (0.0, part) for place, part in enumerate(parts)]


def best(rows: Sequence[Row]) -> list[Row]:
    """Of each task and method the row of the learning rate with the best mean, or the one that tuning chose.

    Only the rates with the most seeds are candidates: a single lucky seed must not win over three.
    """
    chosen: dict[tuple[str, str], Row] = {}  # tasks may have one label, such as two files of one name
    for row in rows:
        key = (row["task_options"], row["method"])
        if key not in chosen or _rank(row) > _rank(chosen[key]):
            chosen[key] = row
    return list(chosen.values())


@dataclass(frozen=True)
class Average:
    """A benchmark's average of one method: the mean over tasks, each task's metrics drawn together first."""

    benchmark: str
    tasks: tuple[str, ...]
    method: str
    scores: dict[int, float]
    """By seed, of the seeds that all tasks have."""
    always: float | None
    """The same mean where each task is answered by its commonest class always; None where that is not known."""


def averages(chosen: Sequence[Row]) -> list[Average]:
    """Over the tasks of each benchmark, of the methods that have all of them; `chosen` is what `best` gives.

    Only where there are two tasks or more of it.
    """
    found = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in chosen if row["benchmark"]):
        rows = [row for row in chosen if row["benchmark"] == benchmark]
        tasks = tuple(dict.fromkeys(row["task"] for row in rows))
        for method in dict.fromkeys(row["method"] for row in rows):
            counted = [row["counted"] for row in rows if row["method"] == method]
            seeds = set.intersection(*(set(each) for each in counted))
            if len(tasks) > 1 and len(counted) == len(tasks) and seeds:
                scores = {seed: mean([each[seed] for each in counted]) for seed in sorted(seeds)}
                always = [row["counted_always"] for row in rows if row["method"] == method]
                known = mean(always) if None not in always else None
                found.append(Average(benchmark, tasks, method, scores, known))
    return found


def unofficial(row: Row) -> dict[str, str]:
    """The splits behind a row that are not the official ones, those it was trained on included: name -> why.

    The user's own rows are none of these: nobody has published numbers for them.
    """
    found = {} if row["official"] or row["own"] else {row["split"]: row["note"]}
    return found if row["train_official"] or row["train_own"] else {**found, row["train_split"]: row["train_note"]}


def _rank(row: Row) -> tuple[bool, int, float]:
    chosen = row["tuned"] is None or row["tuned"]["learning_rate"] == row["learning_rate"]
    return chosen, row["n"], -math.inf if row["mean"] is None else row["mean"]


def _row(members: list[dict[str, Any]], label: str) -> Row:
    first = members[0]
    trained, evaluated = first["splits"]["train"], first["splits"]["evaluation"][0]
    by_seed = {result["seed"]: result for result in sorted(members, key=lambda result: result["seed"])}
    scores = {
        seed: result["metrics"][result["score"]]
        for seed, result in by_seed.items()
        if result["score"] in result["metrics"]
    }
    values = list(scores.values())
    limits = [METRICS[first["score"]].limits] if first["score"] in METRICS else []
    parameters = {key: _average(by_seed, "parameters", key) for key in ("budget", "trainable", "final", "head")}
    parameters["budget"] = parameters["budget"] or parameters["trainable"]  # what has no ranks may spend what it trains
    asked = first["config"].get("budget")
    cost = {key: _average(by_seed, "cost", key) for key in ("seconds", "examples_per_second")}
    return {
        "task": first["task"],
        "task_options": json.dumps(first["config"]["task"], sort_keys=True),
        "method": label,
        "name": first["method"],
        "options": first["options"],
        "model": first["model"],
        "scale": first["config"]["scale"],
        "setting": _setting(first),
        "warmup": first["config"]["warmup"],
        "learning_rate": first["learning_rate"],
        "seeds": list(by_seed),
        "n": len(by_seed),
        "score": first["score"],
        "scores": scores,
        "mean": mean(values) if values else None,
        "sd": sd(values),
        "interval": None if equal(values) else t_interval(values, *limits),
        "metrics": {
            name: {"mean": mean(each), "sd": sd(each)}
            for name in first["metrics"]
            if (each := [result["metrics"][name] for result in by_seed.values() if name in result["metrics"]])
        },
        "benchmark": first.get("benchmark", {}).get("name", ""),
        "counted_always": first.get("benchmark", {}).get("majority"),
        **_spread(by_seed, first),
        "counted": {seed: found["score"] for seed, result in by_seed.items() if (found := result.get("benchmark"))},
        **{key: round(value) for key, value in parameters.items()},
        "asked": asked,
        "used": None if asked is None else parameters["trainable"] / asked,
        **cost,
        "peak_memory": round(_average(by_seed, "cost", "peak_memory_bytes")),
        "adapter_bytes": round(_average(by_seed, "cost", "adapter_bytes")),
        "split": evaluated["name"],
        "rows": evaluated["rows"],
        "official": evaluated["official"],
        "note": evaluated["note"],
        "own": evaluated.get("own", ""),
        "train_split": trained["name"],
        "train_official": trained["official"],
        "train_note": trained["note"],
        "train_own": trained.get("own", ""),
        "searches": {
            seed: asdict(search) for seed, result in by_seed.items() if (search := Search.of(result)) is not None
        },
        "remarks": list(dict.fromkeys(note for result in by_seed.values() for note in result.get("notes", [])))
        + _nothing_learnt(by_seed, label)
        + [_memory(result, label) for result in by_seed.values() if "micro_batch" in result["cost"]],
        "folders": {seed: result["folder"] for seed, result in by_seed.items()},
    }


def _spread(by_seed: dict[int, dict[str, Any]], first: dict[str, Any]) -> Row:
    """`always` and `share` of a row; None in results that know nothing of their answers."""
    main = [found[0] for result in by_seed.values() if (found := spreads(result))]
    metrics = main[0]["metrics"] if main and main[0]["majority"] else {}
    known = first["score"] in metrics
    return {
        "always": _always(main[0], metrics[first["score"]]) if known else None,
        "share": mean([each["share"] for each in main]) if main else None,
    }


def _always(spread: dict[str, Any], score: float) -> dict[str, Any]:
    found = {"class": spread["majority"], "score": score}
    return {**found, "tied": spread["tied"]} if spread.get("tied") else found


def _nothing_learnt(by_seed: dict[int, dict[str, Any]], label: str) -> list[str]:
    """The runs that gave one answer to all rows of a split, the seeds of one sentence together."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for seed, result in by_seed.items():
        for spread in spreads(result):
            if sentence := nothing_learnt(spread):
                seeds.setdefault((spread["split"], sentence), []).append(seed)
    return [
        f"{label}, {'seed' if len(own) == 1 else 'seeds'} {', '.join(map(str, own))}, on {split}: {sentence}"
        for (split, sentence), own in seeds.items()
    ]


def _setting(result: dict[str, Any]) -> str:
    stages = [*result["lineage"], result["config"]]
    return json.dumps(
        [{key: value for key, value in stage.items() if key not in _ASIDE} for stage in stages], sort_keys=True
    )


def _memory(result: dict[str, Any], label: str) -> str:
    rows, most = result["cost"]["micro_batch"], result["config"]["batch_size"]
    return f"seed {result['seed']} of {label} ran out of memory and took {rows} rows at once, {most} a step"


def _average(by_seed: dict[int, dict[str, Any]], part: str, key: str) -> float:
    return mean([result[part][key] for result in by_seed.values()])


def _identity(result: dict[str, Any]) -> str:
    settings = {key: value for key, value in result["config"].items() if key not in _SHOWN_APART}
    return json.dumps([result["method"], result["options"], settings, result["lineage"]], sort_keys=True)


def _labels(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What to call each method: its name, its rank, and whatever else tells it from its like among these results."""
    labels = {}
    for result in results:
        like = [other["options"] for other in results if other["method"] == result["method"]]
        settings = [other["config"] for other in results]
        parts = (
            [
                f"{key}={_word(value)}"
                for key, value in result["options"].items()
                if key == "rank" or any(other.get(key, value) != value for other in like)
            ]
            + [
                *(
                    [f"stage={len(result['lineage']) + 1}"]
                    if result["lineage"] or result["config"].get("followed")
                    else []
                )
            ]
            + [
                f"{key}={_word(value)}"
                for key, value in result["config"].items()
                if key not in _SHOWN_APART
                and any(other.get(key) != value for other in settings)
                # a method without a size has no budget, which its name says
                and (key != "budget" or (value and len({other.get(key) for other in settings} - {None}) > 1))
            ]
        )
        labels[_identity(result)] = " ".join([result["method"], *parts])
    twice = {label for label, number in Counter(labels.values()).items() if number > 1}
    # stages that differ in nothing but the stages before them
    return {
        key: f"{label} chain={hashlib.sha256(key.encode()).hexdigest()[:4]}" if label in twice else label
        for key, label in labels.items()
    }


def _word(value: Any) -> str:
    if value is None:
        return "null"  # as it is written
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, columns as wide as they need; the first is ranged left, numbers right."""
    header, *rows = ([shown_line(cell) for cell in line] for line in (header, *rows))
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [bool(index) and all(_numeric(cell) for cell in column[1:]) for index, column in enumerate(columns)]
    lines = [
        "  ".join(
            cell.rjust(width) if ranged else cell.ljust(width)
            for cell, width, ranged in zip(line, widths, right, strict=True)
        )
        for line in [header, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _numeric(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell[0] in "-+−"
