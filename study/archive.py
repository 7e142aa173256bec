"""What the runs of the study have found, as files small enough to keep: results/STUDY.json for runs/STUDY.

    python study/archive.py keep          # what is finished in runs/, into results/
    python study/archive.py put-back      # the other way round: `rankwise compare` then goes on from there

A row is a run: its settings and its result as they are in its folder and, unless it only tried a rate, its last ranks,
the course of its loss, which rows of the main evaluation split a classifier got right, and the standard error that the
choice of these rows gives its score. Weights are not kept.
"""

import argparse
import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

import yaml

from rankwise.files import read_json, write_whole
from rankwise.metrics.bootstrap import LEVEL, interval
from rankwise.results.predictions import main_split, predictions
from rankwise.results.stats import mean
from rankwise.runs import record

ROOT = Path(__file__).parent.parent
RUNS, RESULTS = ROOT / "runs", ROOT / "results"
STUDIES = [file.stem for file in sorted((ROOT / "experiments").glob("study_*.yaml"))]
EVERY = 10
"""Steps whose losses are kept as their mean."""


def kept(file: Path) -> dict[str, Any]:
    """The content of a file in results/; without rows if there is none."""
    return read_json(file) if file.exists() else {"sites": [], "rows": []}


def row(folder: Path, sites: list[str]) -> dict[str, Any]:
    """The row of a finished run. `sites` gets the names of its sites if it has none yet."""
    text = (folder / "run.yaml").read_text(encoding="utf-8")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    found = {
        **{key: result[key] for key in ("task", "method", "seed", "options", "learning_rate")},
        "kind": yaml.safe_load(text)["kind"],
        "metric": result["score"],
        "value": result["metrics"][result["score"]],
    }
    if found["kind"] == "run":
        found |= course(folder, sites) | {"error": error(folder, found["metric"])}
    return found | {"folder": folder.name, "run.yaml": text, "result.json": result}


def course(folder: Path, sites: list[str]) -> dict[str, Any]:
    """Ranks, losses and right answers of a finished run."""
    steps = [step for step in record.course(folder) if step.loss is not None]
    losses = [steps[place : place + EVERY] for place in range(0, len(steps), EVERY)]
    ranks = [each.ranks for each in record.rank_course(folder)][-1:]
    for found in ranks:
        sites[:] = sites or found
    answers = main_split(folder, ["label", "prediction"]) or {"label": [], "prediction": []}
    right = [str(int(a == b)) for a, b in zip(answers["label"], answers["prediction"], strict=True)]
    return {
        "ranks": [found.get(site, 0) for found in ranks for site in sites],
        "losses": [[each[-1].step, round(mean([step.loss for step in each]), 4)] for each in losses],
        "right": "".join(right) if "1" in right else "",  # numbers and sentences are never the same
    }


def error(folder: Path, metric: str) -> float | None:
    """The standard error of a run's score over the rows that were scored, from the bootstrap of reports."""
    answers = predictions(folder)
    found = interval(metric, [answers]) if answers else None
    return found and round((found[1] - found[0]) / (2 * NormalDist().inv_cdf((1 + LEVEL) / 2)), 6)


def keep(study: str) -> int:
    """Add the finished runs of a study to its file; returns how many rows that has."""
    content = kept(RESULTS / f"{study}.json")
    rows = {each["folder"]: each for each in content["rows"]}
    for done in sorted((RUNS / study).glob("*/result.json")):
        old = rows.get(done.parent.name, {})
        if old.get("result.json") != json.loads(done.read_text(encoding="utf-8")):  # else it may have been put back
            rows[done.parent.name] = row(done.parent, content["sites"])
    if rows:
        lines = ",\n".join(json.dumps(rows[name], ensure_ascii=False) for name in sorted(rows))
        write_whole(RESULTS / f"{study}.json", f'{{"sites": {json.dumps(content["sites"])}, "rows": [\n{lines}\n]}}\n')
    return len(rows)


def put_back(study: str) -> int:
    """Write the folders of a study's rows, those that are there apart; returns how many it has written."""
    missing = [each for each in kept(RESULTS / f"{study}.json")["rows"] if not (RUNS / study / each["folder"]).exists()]
    for each in missing:
        folder = RUNS / study / each["folder"]
        folder.mkdir(parents=True)
        write_whole(folder / "run.yaml", each["run.yaml"])
        write_whole(folder / "result.json", json.dumps(each["result.json"], indent=1, ensure_ascii=False) + "\n")
    return len(missing)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["keep", "put-back"])
    what = parser.parse_args().what
    for name in STUDIES:
        if what == "keep":
            print(f"results/{name}.json: {keep(name)} rows")
        else:
            print(f"runs/{name}: {put_back(name)} runs put back")
