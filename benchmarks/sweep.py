"""Short runs in a sweep, each a fork of a process that has done their imports, next to one process for all of them.

    python benchmarks/sweep.py                     # eight runs of 20 steps of MiniLM, on one core
    python benchmarks/sweep.py --model random-bert --steps 5 --cores 2
    python benchmarks/sweep.py --workers 4         # instead, the memory of as many runs at once

The arms take turns: `one` is a process that carries out the runs one after another, with nothing between them; `forked`
is the sweep as it is, `fresh` one that starts a process for each run. The sweep's own imports count in none of them. A
row has the median of the ratios of a round to `one`, of the time on the clock and on the cores; `--json FILE` writes
their quartiles too. Of memory it is the proportional set size: a page that n processes share counts 1/n in each.
"""

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from measures import over
from rich.console import Console

from rankwise import methods, tasks
from rankwise.runs.record import progress
from rankwise.runs.store import Store
from rankwise.sweep.compare import carry_out
from rankwise.sweep.runners.local import Local

FRESH = ("env", sys.executable, "-m", "rankwise", "train")
"""Another command than the default, with which each run is a fresh process."""
ONE = """
import sys
from pathlib import Path
from rankwise.train.run import run
for folder in sys.argv[1:]:
    run(Path(folder))
"""
TRAIN = {"task": "stdlib-kind", "learning_rate": 1e-3, "max_length": 32, "eval_rows": 48, "eval_every": 0}
Arm = Callable[[list[Path], int], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--model", help="MiniLM when absent")
    parser.add_argument("--cores", type=int, default=1, help="as many runs at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, help="measure the memory of so many runs at once")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked.workers or asked.cores])
    methods.registry()
    tasks.registry()  # as a sweep has done when its runs begin
    rows = memory(asked) if asked.workers else times(asked)
    print("|", " | ".join(rows[0]), "|\n|", "---|" * len(rows[0]), sep="")
    for row in rows:
        cells = (f"{value[1]:.2f}" if isinstance(value, list) else str(value) for value in row.values())
        print("|", " | ".join(cells), "|", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"settings": {**vars(asked), "json": None}, "rows": rows}, indent=1))


def times(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each arm, with its time over that of `one`."""
    arms: dict[str, Arm] = {"one": one, "forked": swept(), "fresh": swept(FRESH)}
    clock: dict[str, list[float]] = {arm: [] for arm in arms}
    cores: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(asked.rounds):
        for arm, carried_out in arms.items():
            with tempfile.TemporaryDirectory() as place:
                folders = runs(Path(place), asked, asked.runs)
                start, used = time.perf_counter(), spent()
                carried_out(folders, asked.cores)
                clock[arm].append(time.perf_counter() - start)
                cores[arm].append(spent() - used)
                assert all(Store(Path(place)).state(folder) == "done" for folder in folders)
    return [
        {
            "arm": arm,
            "÷ one, on the clock": over(clock[arm], clock["one"]),
            "÷ one, on the cores": over(cores[arm], cores["one"]),
            "seconds": round(statistics.median(clock[arm]), 1),
        }
        for arm in arms
    ]


def memory(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind of sweep: the MB of all its processes while each of its runs trains."""
    rows = []
    for arm, command in (("forked", Local.command), ("fresh", FRESH)):
        with tempfile.TemporaryDirectory() as place:
            asked.steps = 10_000
            folders, local = runs(Path(place), asked, asked.workers), Local(asked.workers, command=command)
            for folder in folders:
                local.start(folder)
            while any(progress(folder)[0] < 5 for folder in folders):
                assert not local.ended(), "a run has ended"
                time.sleep(0.1)
            processes = [process.pid for process in local._live.values()]
            processes += [local._parent._process.pid] if local._parent else []
            found = [smaps(process) for process in processes]
            local.stop(0)
            local.close()
        row: dict[str, Any] = {"arm": arm, "runs": asked.workers}
        rows.append(row | {f"{key}, MB": round(sum(each[key] for each in found) / 1000) for key in ("Pss", "Rss")})
    return rows


def runs(place: Path, asked: argparse.Namespace, count: int) -> list[Path]:
    """Folders of runs that differ by their seed."""
    rows = {"batch_size": asked.batch, "max_steps": asked.steps, "train_rows": 640, "checkpoint_every": 10_000}
    settings = {**TRAIN, **rows, "model": asked.model, "method": {"name": "lora", "rank": 8}}
    folders = [place / f"run-{seed}" for seed in range(count)]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        (folder / "run.yaml").write_text(yaml.safe_dump({**settings, "seed": seed, "id": f"{seed:012}"}))
    return folders


def one(folders: list[Path], jobs: int) -> None:
    environment = {**os.environ, **Local(jobs).environment()}
    command = [sys.executable, "-c", ONE, *map(str, folders)]
    subprocess.run(command, env=environment, capture_output=True, check=True)


def swept(command: tuple[str, ...] = Local.command) -> Arm:
    def carried_out(folders: list[Path], jobs: int) -> None:
        carry_out(Store(folders[0].parent), folders, Local(jobs, command=command), Console(file=io.StringIO()))

    return carried_out


def spent() -> float:
    """Seconds of computing of all processes that have been started and are over."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def smaps(process: int) -> dict[str, int]:
    """The kB of a process by kind."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) for line in lines}


if __name__ == "__main__":
    main()
