"""Whether training with suggested ranks scores better than with uniform ones, or with the suggested ones shuffled.

    OMP_NUM_THREADS=1 python benchmarks/suggested_ranks.py stdlib-kind 85000

`rankwise suggest` runs first. Then the model is trained with each of the three plans, at three seeds that the searches
did not have; the ranks of layers of equal cost change places in the shuffled plan. A Markdown table is printed.
"""

import argparse
import json
import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import rankwise as rw
from rankwise.methods.lora import LoRA
from rankwise.ranks import RankPlan

SEEDS = (10, 11, 12)
SETTINGS = {"max_length": 48, "train_rows": 960, "eval_rows": 480, "epochs": 3, "learning_rate": 3e-3, "eval_every": 0}
METHOD = {"rank": 4, "alpha": 8.0}


@dataclass(frozen=True)
class Planned(LoRA, name="planned"):
    """LoRA with the ranks in a file.

    Attributes:
        plan: a JSON file with the rank of each layer.
    """

    plan: str = ""

    keeps_ranks = False

    def first_plan(self, model: nn.Module) -> RankPlan:
        return RankPlan(json.loads(Path(self.plan).read_text()), change="reinit")


def shuffled(ranks: Mapping[str, int], costs: Mapping[str, int]) -> dict[str, int]:
    """The same ranks at other layers of equal cost."""
    draw, found = random.Random(0), dict(ranks)
    for cost in sorted(set(costs.values())):
        names = [name for name in costs if costs[name] == cost]
        values = [ranks[name] for name in names]
        draw.shuffle(values)
        found.update(zip(names, values, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("budget", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs/suggested_ranks"))
    given = parser.parse_args()
    settings = {"task": given.task, **SETTINGS, "plugins": [__file__]}
    found = rw.suggest({**settings, "method": {"name": "lora", **METHOD}}, budget=given.budget, runs=given.runs, jobs=1)
    print("\n".join(found.lines()))
    costs = found.agreement.costs
    plans = {
        "uniform": found.agreement.uniform,
        "suggested": found.together,
        "suggested, shuffled": shuffled(found.together, costs),
    }
    print("\n| ranks | parameters | mean | seeds |\n|---|---|---|---|")
    for name, plan in plans.items():
        file = given.runs / f"{name.replace(', ', '-')}.json"
        file.write_text(json.dumps(plan))
        method = {"name": "planned", **METHOD, "plan": str(file)}
        done = [rw.train({**settings, "method": method, "seed": seed}, runs=given.runs / "trained") for seed in SEEDS]
        scores = [run.result["metrics"][run.result["score"]] for run in done]
        each = ", ".join(f"{score:.3f}" for score in scores)
        print(f"| {name} | {done[0].result['parameters']['final']:,} | {statistics.mean(scores):.3f} | {each} |")


if __name__ == "__main__":
    main()
