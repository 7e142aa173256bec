"""What the study has found, as cells: one method at one size on one task, with its runs by seed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from archive import RESULTS, STUDIES, kept

from rankwise.metrics import METRICS
from rankwise.metrics.metric import Metric
from rankwise.named import asked
from rankwise.results.stats import mean
from rankwise.results.tuning import Edge, Rate, best

NAMES = {
    "lora": "LoRA",
    "spaced-lora": "LoRA, spaced",
    "simplex-lora": "SimplexLoRA",
    "weight-lora": "WeightLoRA",
    "random-lora": "LoRA in random layers",
    "lora-fa": "LoRA-FA",
    "sora": "SoRA",
    "adalora": "AdaLoRA",
    "bitfit": "BitFit",
    "head": "the head alone",
    "none": "as it comes",
    "full": "full",
    "fourierft": "FourierFT",
    "ia3": "IA³",
    "tinylora": "TinyLoRA",
    "vb-lora": "VB-LoRA",
    "vera": "VeRA",
}
KINDS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "attention.output",
    "up_proj": "intermediate",
    "attention.output.dense": "attention.output",
    "intermediate.dense": "intermediate",
}
"""Kinds of layers by one name, whatever the model calls them."""
ATTENTION = {"query", "key", "value", "attention.output"}
RANKED = ("lora", "spaced-lora", "squeeze", "simplex-lora", "lora-fa", "adalora")
LEVELS = ("none", "head", "full")
"""Methods of one size, which the pictures have as lines across."""
OWN = {"squeeze": "spectrum", "simplex-lora": "omega"}
"""What decides ranks in the methods that have controls."""
SCREEN, STARTS = "study_tasks", "study_starts"
"""The files of candidates for tasks and of starts, which are no tasks of their own."""
ENOUGH = 3
"""Seeds, from which on gaps are judged and averaged."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One method at one size on one task: its reported runs by seed.

    `edge`: whether their rate is the lowest or the highest of those tried. `tuning_seeds` and `tuning_rows`: how many
    seeds and rows chose it.
    """

    rows: Mapping[int, dict[str, Any]]
    edge: Edge = ""
    tuning_seeds: int = 0
    tuning_rows: int = 0

    @property
    def first(self) -> dict[str, Any]:
        return next(iter(self.rows.values()))

    @property
    def method(self) -> str:
        return self.first["method"]

    @property
    def score(self) -> str:
        """What decided the ranks; empty for methods that do not choose."""
        return self.first["options"].get("score", OWN.get(self.method, ""))

    @property
    def name(self) -> str:
        """The method without its size."""
        options, words = self.first["options"], [NAMES.get(self.method, self.method)]
        if isinstance(targets := options.get("targets"), list):
            kinds = [KINDS.get(each, each) for each in targets]
            words[0] += f" on {'attention' if {*kinds} == ATTENTION else ' and '.join(kinds)}"
        words += [self.score] if self.score != OWN.get(self.method, "") else []
        if self.method == "simplex-lora" and options.get("omega_rate"):
            words.append(f"ω at rate {options['omega_rate']:g}")
        if self.method == "squeeze":
            words += [f"from rank {options['rank']}"] if options["rank"] != 8 else []
            steps = [step for step, _ in self.first["losses"][-1:]]
            words += [f"{options['times']} cuts"] if options["times"] > 1 else []
            words += ["cut at the end"] if steps == [options["every"] * options["times"]] else []
        return ", ".join([*words, *(["pulled"] if options.get("pull") else [])])

    @property
    def size(self) -> float | None:
        """Units of rank per site; None where rank is not what decides the size."""
        options = self.first["options"]
        return options.get("mean_rank", options.get("rank")) if self.method in RANKED else None

    @property
    def key(self) -> tuple[str, str]:
        """Name and size: equal for the same method on other tasks and models."""
        named = isinstance(self.first["options"].get("targets"), list)
        return self.name, str(self.size or _asked(self.first, but="targets" if named else ""))

    @property
    def scores(self) -> dict[int, float]:
        return {seed: row["value"] for seed, row in self.rows.items()}

    @property
    def parameters(self) -> float:
        """At the end, without the head."""
        return mean([row["result.json"]["parameters"]["final"] for row in self.rows.values()])

    @property
    def bytes(self) -> float:
        """Of the saved file of weights."""
        return mean([row["result.json"]["cost"]["adapter_bytes"] for row in self.rows.values()])


@dataclass(frozen=True, eq=False)
class Study:
    """One task: its cells, in the order of their sizes."""

    name: str
    sites: Sequence[str]
    cells: Sequence[Cell]

    @cached_property
    def reference(self) -> Cell | None:
        """LoRA of rank 8."""
        return self.find("LoRA", 8)

    def find(self, name: str, size: float | None) -> Cell | None:
        return next((cell for cell in self.cells if (cell.name, cell.size) == (name, size)), None)

    def plain(self, size: float | None) -> Cell | None:
        """LoRA of this size: of equal rank, or spaced."""
        return self.find("LoRA", size) or self.find("LoRA, spaced", size)

    @cached_property
    def margin(self) -> float | None:
        """One standard error of the reference's score over the rows that were scored: the mean over its seeds.

        None without a reference, and where no error could be computed.
        """
        errors = [row["error"] for row in self.reference.rows.values() if row["error"]] if self.reference else []
        return mean(errors) if errors else None


def studies() -> list[Study]:
    """Those with results, in the order of their names."""
    found = []
    for name in (each for each in STUDIES if each not in (SCREEN, STARTS)):
        content = kept(RESULTS / f"{name}.json")
        if found_cells := cells(content["rows"]):
            found.append(Study(name.removeprefix("study_"), content["sites"], found_cells))
    return found


@dataclass(frozen=True, eq=False)
class Start(Cell):
    """One start of A and B at one rate: its runs by seed."""

    @property
    def of(self) -> tuple[str, float, float]:
        """What starts are compared within: method, α and rate."""
        return NAMES[self.method], self.first["options"]["alpha"], self.first["learning_rate"]

    @property
    def init(self) -> str:
        return self.first["options"]["init"]

    def losses(self, first: int, last: int) -> dict[int, float]:
        """The mean loss of the steps from `first` to `last`, both included; they are kept as means of ten steps."""
        return {
            seed: mean([loss for step, loss in row["losses"] if first <= step <= last])
            for seed, row in self.rows.items()
        }


def starts() -> list[Start]:
    """Those with results: by method and α, then by rate, the random start first."""
    found: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in kept(RESULTS / f"{STARTS}.json")["rows"]:
        options = row["options"]
        key = row["method"], options["alpha"], row["learning_rate"], options["init"] != "kaiming", options["init"]
        assert row["seed"] not in found.setdefault(key, {}), "two starts of one name"
        found[key][row["seed"]] = row
    return [Start(found[key]) for key in sorted(found)]


def _asked(row: Mapping[str, Any], but: str = "") -> str:
    """The method of a run and its options but for defaults: an option may have been added since."""
    found = asked("method", {"name": row["method"], **row["options"]})
    return str(sorted((key, value) for key, value in found.items() if key != but))


def chosen_on(trial: Mapping[str, Any]) -> int:
    """How many rows a run that tries a rate was scored on."""
    return int(trial["result.json"]["splits"]["evaluation"][0]["rows"])


def cells(rows: Iterable[dict[str, Any]]) -> list[Cell]:
    """The cells with reported runs, each at the rate that `rankwise compare` chooses from all that were tried."""
    by_options: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        assert not METRICS.get(row["metric"], Metric()).least_is_best, "gaps are read as gains"
        by_options.setdefault(_asked(row), {"run": [], "trial": []})[row["kind"]].append(row)
    found = []
    no_edge: Edge = ""
    for each in by_options.values():
        most = max((chosen_on(row) for row in each["trial"]), default=0)
        tried: dict[float, dict[int, float]] = {}
        for row in each["trial"]:
            if chosen_on(row) == most:  # a choice on more rows takes the place of one on fewer
                tried.setdefault(row["learning_rate"], {})[row["seed"]] = row["value"]
        runs, edge, seeds = each["run"], no_edge, 0
        if tried:
            (chosen, *_), edge = best([Rate(rate, tried[rate]) for rate in sorted(tried)], each["trial"][0]["metric"])
            runs, seeds = [row for row in runs if row["learning_rate"] == chosen.learning_rate], chosen.n
        if runs:
            found.append(Cell({row["seed"]: row for row in runs}, edge, seeds, most))
    assert len({(cell.name, cell.size or cell.parameters) for cell in found}) == len(found), "two cells of one name"
    return sorted(found, key=lambda cell: (-cell.parameters, cell.name))
