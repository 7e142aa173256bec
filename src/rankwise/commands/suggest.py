"""Ranks for a LoRA that any trainer can train, from two short searches on the user's data.

A search trains plain LoRA at twice the rank that the budget allows everywhere, for some steps. What it has learnt at
layer i, s B_i A_i with singular values σ_ik, says what each unit of rank there is worth: σ_ik². A plan gives rank where
the sum of these is largest within the budget (`ranks.knapsack`). Two searches differ in their seed alone: in the fresh
factors, and in the order of the rows. Where their plans do not agree (`results.agreement`) they are no evidence, and
uniform ranks are suggested, or rank 1 in layers spread evenly where the budget does not allow it everywhere; where they
do, the ranks of both searches together.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from rankwise import methods, tasks
from rankwise.adapters.cut import spectrum
from rankwise.adapters.plain import on_part
from rankwise.adapters.stored import StoredAdapter, stored
from rankwise.commands.snippets import AXOLOTL, axolotl, snippets
from rankwise.errors import STOPPED, InputError
from rankwise.files import ADAPTER, check_replaceable, replace_folder, unfinished, write_whole
from rankwise.methods.lora import LoRA
from rankwise.pictures.heat import layer_name, rank_grid, rank_pictures
from rankwise.pictures.style import svg
from rankwise.ranks import sites
from rankwise.ranks.allocate import equal_rank, evenly
from rankwise.ranks.knapsack import most_within
from rankwise.ranks.sites import kind
from rankwise.results.agreement import Agreement
from rankwise.results.formats import plain
from rankwise.runs.store import Store
from rankwise.settings import RunConfig, complete
from rankwise.sweep.check import Source, check_models, load_one, schema
from rankwise.sweep.compare import carry_out
from rankwise.sweep.makers import makers, settle
from rankwise.sweep.runners import Runner
from rankwise.train import model as models
from rankwise.train.arguments import Loading

STEPS = 100
"""Steps of a search, unless told otherwise."""
SCORED = 16
"""Rows that a search is scored on at most; ranks do not depend on them."""
SCALE = 2.0
"""s = alpha / rank where the configuration has no method with a rank."""
CONFIG, _, WEIGHTS = ADAPTER[:3]


@dataclass(frozen=True)
class Wanted:
    """What is to be searched for, with nothing written yet.

    Attributes:
        runs: the settings of the two searches.
        budget: parameters at most, without the head.
        scale: s, by which each product B A is multiplied, whatever its rank.
    """

    runs: Sequence[RunConfig]
    budget: int
    scale: float

    @classmethod
    def of(cls, source: Source | None, settings: Sequence[str], budget: int, steps: int = STEPS) -> "Wanted":
        """From a file, its content or the folder of a run.

        Raises InputError for all that a run would refuse, and for a budget that does not allow rank 1 everywhere, or so
        much that there is nothing to choose.
        """
        config = load_one(source, settings)
        given = methods.build(config.method)
        scale = given.alpha / given.rank if isinstance(given, LoRA) else SCALE
        options: dict[str, Any] = {}
        if isinstance(given, LoRA):
            options = {"targets": given.targets, "dropout": given.dropout}
        rank = _search_rank(config, LoRA(rank=1, **options), budget)
        changed: dict[str, Any] = {
            "method": {"name": "lora", "rank": rank, "alpha": scale * rank, **options},
            "max_steps": steps,
            "warmup": config.warmup if config.warmup <= 1 else RunConfig.model_fields["warmup"].default,
            "eval_every": 0,
            "eval_rows": min(config.eval_rows or SCORED, SCORED),
            "checkpoint_every": math.ceil(steps / 4),
            "budget": None,
            "runs": str(Path(config.runs) / "suggest"),
            "report_to": [],
        }
        last = 2**32 - 1
        seeds = config.seed, config.seed + 1 if config.seed < last else 0
        runs = [complete(config.model_copy(update={**changed, "seed": seed}), schema()) for seed in seeds]
        check_models(runs, shipped=False)
        return cls(runs, budget, scale)

    def carry_out(self, runner: Runner, reuse: bool = False, repeat: bool = False) -> "Suggestion":
        """Carry out what is left of the searches, and compare their plans.

        Raises SystemExit if a search was stopped (the same call goes on), InputError or RuntimeError if one failed.
        """
        store = Store(self.runs[0].runs)
        maker = makers(store, self.runs)
        wanted = {store.place(each): maker(each) for each in self.runs}
        settle(store, wanted, reuse, repeat)
        folders = [store.create(each, maker(each)) for each in self.runs]
        outcome = carry_out(store, folders, runner)
        for folder in outcome.failed:
            failure = store.failure(folder)
            raise (InputError if failure.refused else RuntimeError)(f"{folder}: {failure.error}")
        if outcome.stopped:
            raise SystemExit(STOPPED)
        return Suggestion.of(self, folders)


def check_free(out: Path, force: bool) -> None:
    """Raise InputError where `Suggestion.write` would lose something; `force` says that its own files may go."""
    paths = [out, *([out.with_suffix(AXOLOTL)] if out.suffix == ".json" else [])]
    taken = [path for path in paths if os.path.lexists(path)]
    if taken and not force:
        raise InputError(f"{taken[0]}: is there already; give another name, or --force to replace it")
    if out.suffix != ".json":
        check_replaceable(out, {*ADAPTER}, "an adapter")
    elif out.is_dir():
        raise InputError(f"{out}: is a folder; give the name of a file, or of a folder that does not end in .json")


def _search_rank(config: RunConfig, method: LoRA, budget: int) -> int:
    """Twice the uniform rank of the budget, as far as every layer allows it."""
    task = tasks.build(config.task)
    model = models.attached_skeleton(config.model, task, method, config.max_length, False, Loading.of(config))
    found = sites(model)
    if parts := [site.name for site in found if on_part(site)]:
        raise InputError(
            f"targets: {parts[0]} is a part of a fused projection, which PEFT adapts as a whole: name that"
        )
    costs, limits = {site.name: site.cost for site in found}, {site.name: site.limit for site in found}
    uniform = max(uniform_ranks(costs, limits, budget).values())
    least = min(limits, key=limits.__getitem__)
    if limits[least] <= uniform:
        raise InputError(
            f"budget = {budget}: allows rank {uniform} everywhere, the most that {least} can use, which leaves nothing "
            "to choose; lower the budget, or name other targets"
        )
    return min(2 * uniform, limits[least])


def uniform_ranks(costs: Mapping[str, int], limits: Mapping[str, int], budget: int) -> dict[str, int]:
    """The largest rank that all layers can have within the budget, less only where a layer cannot use it.

    A budget that is too small for rank 1 in all layers is spread evenly, as in spaced-lora: rank 1 in every k-th layer.

    Raises InputError where some layer costs more than the budget.
    """
    if max(costs.values()) > budget:
        name = max(costs, key=costs.__getitem__)
        raise InputError(
            f"budget = {budget}: rank 1 of {name} alone needs {costs[name]:,} parameters; raise it, or name other "
            "targets"
        )
    if sum(costs.values()) > budget:
        return dict(zip(costs, evenly([*map(kind, costs)], [*costs.values()], [1] * len(costs), budget), strict=True))
    rank = equal_rank([*costs.values()], [limits[name] for name in costs], budget)
    return {name: min(rank, limits[name]) for name in costs}


@dataclass(frozen=True)
class Suggestion:
    """What the two searches suggest.

    Attributes:
        wanted: what was searched for.
        folders: those of the two searches.
        adapter: what the first one has trained, for the names and shapes of its layers.
        agreement: how far their plans agree.
        together: the ranks of both searches together, by layer.
    """

    wanted: Wanted
    folders: Sequence[Path]
    adapter: StoredAdapter
    agreement: Agreement
    together: Mapping[str, int]

    @classmethod
    def of(cls, wanted: Wanted, folders: Sequence[Path]) -> "Suggestion":
        """From two searches that are done."""
        adapters = [stored(folder) for folder in folders]
        names, budget = adapters[0].names, wanted.budget
        costs = {name: adapters[0].cost(name) for name in names}
        uniform = uniform_ranks(costs, {name: adapters[0].limit(name) for name in names}, budget)
        learnt = [_shares(each) for each in adapters]
        plans = [_best(each, costs, budget) for each in learnt]
        kept = [_kept(learnt[1], plans[0]), _kept(learnt[0], plans[1])]
        agreement = Agreement(
            first=plans[0],
            second=plans[1],
            uniform=uniform,
            costs=costs,
            kept=sum(kept) / 2,
            kept_by_uniform=sum(_kept(each, uniform) for each in learnt) / 2,
        )
        both = {name: (learnt[0][name] + learnt[1][name]) / 2 for name in names}
        return cls(wanted, folders, adapters[0], agreement, _best(both, costs, budget))

    @cached_property
    def doubts(self) -> list[str]:
        """Why there is no evidence for other ranks than uniform ones; [] if there is."""
        return self.agreement.doubts()

    @property
    def ranks(self) -> dict[str, int]:
        """The suggested ranks, by layer: those of both searches together, or uniform ones."""
        return dict(self.agreement.uniform if self.doubts else self.together)

    @property
    def parameters(self) -> int:
        """Parameters that train with these ranks, without the head; at most the budget."""
        return sum(rank * self.agreement.costs[name] for name, rank in self.ranks.items())

    @property
    def config(self) -> dict[str, Any]:
        """The options of PEFT's LoraConfig that differ from its defaults, and those that decide ranks and scale.

        Every layer has its rank by its full name (the ^ needs PEFT 0.15 or later), and the alpha by which it is scaled
        by the same s = alpha / rank as every other one.
        """
        ranks, scale = {name: rank for name, rank in self.ranks.items() if rank}, self.wanted.scale
        usual = Counter(ranks.values()).most_common(1)[0][0]
        patterns = {f"^{re.escape(name)}": rank for name, rank in sorted(ranks.items()) if rank != usual}
        trained = self.adapter.config or {}
        kept = {key: trained[key] for key in ("task_type", "modules_to_save", "fan_in_fan_out") if trained.get(key)}
        return {
            "peft_type": "LORA",
            **kept,
            "r": usual,
            "lora_alpha": _whole(scale * usual),
            "lora_dropout": trained.get("lora_dropout", 0.0),
            "target_modules": self._targets([*ranks]),
            "rank_pattern": patterns,
            "alpha_pattern": {key: _whole(scale * rank) for key, rank in patterns.items()},
        }

    def _targets(self, names: list[str]) -> list[str] | str:
        """The layers by name; as an expression where PEFT would take a name for the end of a layer without rank."""
        left_out = self.ranks.keys() - {*names}
        if any(other.endswith(f".{name}") for name in names for other in left_out):
            return "|".join(map(re.escape, names))
        return names

    def write(self, out: Path) -> None:
        """Write `config` to `NAME.json`, or to a folder of any other name with an untrained adapter to train on from.

        Next to the file come axolotl's keys, for a model that writes text. What is there already is replaced;
        `check_free` is asked beforehand.
        """
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix != ".json":
            self._write_folder(out)
        else:
            write_whole(out, json.dumps(self.config, indent=2) + "\n")
            if text := axolotl(self.config, self.parameters):
                write_whole(out.with_suffix(AXOLOTL), text)

    def _write_folder(self, out: Path) -> None:
        with unfinished(out, folder=True) as temporary:
            new = temporary / "adapter"
            new.mkdir()
            base = (self.adapter.config or {}).get("base_model_name_or_path")
            (new / CONFIG).write_text(json.dumps({**self.config, "base_model_name_or_path": base}, indent=2) + "\n")
            save_file(dict(self._untrained()), new / WEIGHTS, {"format": "pt"})
            replace_folder(out, new)

    def _untrained(self) -> Iterator[tuple[str, Tensor]]:
        """A and B of every layer as PEFT starts them: A uniform within ± 1 / √in, B = 0."""
        draw = torch.Generator().manual_seed(0)
        for name, rank in self.ranks.items():
            parts, shape = self.adapter.layers[name].parts, self.adapter.tensors.shape
            a, b = (list(shape[parts[part]]) for part in ("A", "B"))
            bound = 1 / math.sqrt(math.prod(a[1:]))
            if rank:
                yield parts["A"], torch.empty(rank, *a[1:]).uniform_(-bound, bound, generator=draw)
                yield parts["B"], torch.zeros(b[0], rank, *b[2:])

    def lines(self) -> Iterator[str]:
        """What is suggested and why, in words."""
        found, ranks = self.agreement, self.ranks
        first, second = self.wanted.runs
        yield (
            f"two searches of {first.max_steps} steps at rank {first.method['rank']}, "
            f"seeds {first.seed} and {second.seed}:"
        )
        if found.correlation is not None:
            yield (
                f"  rank correlation over {len(ranks)} layers: {found.correlation:.2f} "
                f"({found.shuffled:.2f} if shuffled among layers of equal cost, p = {found.p:.2g})"
            )
        if found.changed:
            yield f"  of {len(found.changed)} layers that both change, {len(found.alike)} change in the same direction"
        yield (
            f"  of what one has learnt (Σσ²), the ranks of the other keep {found.kept:.1%}, uniform ranks "
            f"{found.kept_by_uniform:.1%}"
        )
        if self.doubts:
            yield f"no evidence for ranks other than uniform ones: {'; '.join(self.doubts)}"
        else:
            yield "the two agree on where rank is used, so these are the ranks of both together. Searches on random"
            yield "labels can agree too: only training with these and with uniform ranks can say which score better"
        yield ""
        rows, layers, grid = rank_grid(ranks)
        cells = [["" if math.isnan(rank) else f"{rank:.0f}" for rank in row] for row in grid]
        yield plain(["layer", *map(layer_name, layers)], [[name, *row] for name, row in zip(rows, cells, strict=True)])
        yield ""
        yield f"{self.parameters:,} parameters of {self.wanted.budget:,}"

    def snippets(self, out: Path) -> dict[str, str]:
        """By trainer, what to type so that it takes what `write` has written."""
        return snippets(self.config, self.parameters, out)

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        found = self.agreement
        return {
            "config": self.config,
            "parameters": self.parameters,
            "budget": self.wanted.budget,
            "uniform": bool(self.doubts),
            "doubts": self.doubts,
            "agreement": {
                "correlation": found.correlation,
                "shuffled": found.shuffled,
                "p": found.p,
                "common": found.common,
                "changed": len(found.changed),
                "alike": len(found.alike),
                "kept": found.kept,
                "kept_by_uniform": found.kept_by_uniform,
            },
            "ranks": self.ranks,
            "plans": {run.seed: plan for run, plan in zip(self.wanted.runs, (found.first, found.second), strict=True)},
            "searches": [str(folder) for folder in self.folders],
        }

    def save_picture(self, file: Path) -> Path:
        """Draw the plans of the two searches next to each other, as an SVG file."""
        found = self.agreement
        plans = zip(self.wanted.runs, (found.first, found.second), strict=True)
        titles = {f"seed {run.seed}": plan for run, plan in plans}
        write_whole(file, svg(rank_pictures(titles, "Ranks by two searches")))
        return file


def _shares(adapter: StoredAdapter) -> dict[str, np.ndarray]:
    """σ² of each unit of rank by layer, (r,), as shares of their sum over all layers."""
    found = {name: spectrum(adapter.factors(name)).gains for name in adapter.names}
    total = sum(each.sum() for each in found.values())
    if not total > 0:
        raise InputError(f"{adapter.path}: the search has learnt nothing: give it more steps")
    return {name: each / total for name, each in found.items()}


def _best(shares: Mapping[str, np.ndarray], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """The ranks that keep most within the budget, by layer."""
    ranks = most_within([shares[name] for name in costs], [*costs.values()], budget)
    return dict(zip(costs, ranks, strict=True))


def _kept(shares: Mapping[str, np.ndarray], ranks: Mapping[str, int]) -> float:
    return sum(float(shares[name][:rank].sum()) for name, rank in ranks.items())


def _whole(alpha: float) -> float:
    """`alpha` as a whole number if it is one, as some trainers want it."""
    return int(alpha) if alpha == int(alpha) else alpha
