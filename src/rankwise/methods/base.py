"""A method decides the ranks, and the rank engine changes them. Each method is one file in this folder."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar

from peft.utils import ModulesToSaveWrapper
from torch import nn

from rankwise.errors import InputError
from rankwise.named import Named
from rankwise.optim import SimplexAdam
from rankwise.ranks import RankPlan, rank_report, ranks, sites
from rankwise.ranks.layers import keep_codes
from rankwise.ranks.resize import resize
from rankwise.ranks.scales import trained_scales
from rankwise.runs.search import Search

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class Method(Named, ABC, kind="method"):
    """One way to spend trainable parameters on a frozen model. Its fields are the YAML options.

    It has no state: what must survive a restart is a tensor in the model, so resuming needs no extra code.
    """

    whole: ClassVar[bool] = False
    """Whether all weights of the model train, so that any other method can go on from the result."""
    sizes: ClassVar[tuple[str, ...]] = ()
    """The options that decide how much trains. A run's budget chooses them if none is given, counting up the first.
    Empty for a method whose size depends on the model alone."""

    factors: ClassVar[str] = "AB"
    """The factors that train, for a method with sites."""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "attach" in vars(cls):
            cls.attach = _exact(cls.attach)  # type: ignore[method-assign]

    @abstractmethod
    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        """Freeze `model` and add what trains. The modules named in `head` stay trainable and are saved whole.

        Raises:
            InputError: what trains is not exactly what the sites cost (see `beside`), or `model` or `head` do not fit.
        """

    def first_plan(self, model: nn.Module) -> RankPlan | None:
        """The initial ranks if they differ from those after `attach`; carried out right after it."""
        return None

    def beside(self, model: nn.Module) -> list[nn.Parameter]:
        """What trains in addition to the factors of the sites, their scales and the head, such as DoRA's magnitudes."""
        return []

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Disjoint groups of all that trains, in model order. Biases and norms get no weight decay."""
        adapters = {id(p) for site in sites(model) if site.present for p in (site.A, site.B)}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in adapters]
        return [
            {"name": "adapter", "params": [p for p in model.parameters() if id(p) in adapters and p.requires_grad]},
            {"name": "weights", "params": [p for p in rest if p.dim() > 1]},
            {"name": "biases", "params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        ]

    def optimizer(self, model: nn.Module, args: "TrainingArguments") -> SimplexAdam:
        """SimplexAdam with the rate, betas, epsilon and weight decay of `args`.

        Raises:
            InputError: `args` ask for another optimizer than AdamW, or give it options.
        """
        return SimplexAdam(self, model, *adam_options(args))

    def before_step(self, model: nn.Module) -> None:  # noqa: B027 - most methods do nothing
        """Called right before each optimizer step, when gradients are complete: to add to them."""

    def after_step(self, model: nn.Module, step: int, lr: float) -> RankPlan | None:
        """Called after each optimizer step: changes scales in place, and returns a plan when ranks change.

        The plan is carried out afterwards, completely or not at all, so do none of it here.

        Args:
            step: steps taken so far; 1 after the first.
            lr: the size of this step of ω or the gates: their rate or clock, 0 while they do not move. Without a
                scale, the rate of the first group.
        """
        return None

    def search(self, model: nn.Module, moved: float | None = None) -> Search | None:
        """The result of the search for ranks so far, before `fold`; None for a method that learns none.

        Args:
            moved: `RankPlan.moved` of the last plan, None before the first. `SimplexAdam.search` passes it.
        """
        return self._changed(ranks(model))

    def _changed(self, current: Mapping[str, int]) -> Search | None:
        """How many sites have another rank than at the start."""
        if not self.check_every or not self.sizes or not current:
            return None
        initial = getattr(self, self.sizes[0])
        return Search(sum(rank != initial for rank in current.values()), len(current))

    def last_plan(self, model: nn.Module) -> RankPlan:
        """The plan by which the model can become plain LoRA with unchanged outputs at any time; see `fold`."""
        return RankPlan({}, fold=True)

    def fold(self, model: nn.Module) -> nn.Module:
        """Make the model plain LoRA with unchanged outputs, in place: every scale moves into its factors."""
        if sites(model):
            resize(model, self.last_plan(model))
        return model

    def weights(self, model: nn.Module) -> dict[str, float] | None:
        """ω by site during a search, else None."""
        return None

    def budget(self, model: nn.Module) -> int:
        """The most adapter parameters after training, of a model just attached: by default the cost of its ranks."""
        return rank_report(model).total

    def sized(self, size: int) -> "Method":
        """This method at another size, 1 or more; the larger, the more trains."""
        return replace(self, **{self.sizes[0]: size})

    def peak(self, model: nn.Module) -> int:
        """The most parameters that train at once, including the head's, on a model just attached.

        What a search needs counts too: ω, gates, ranks that will be cut. A search whose ranks may grow (`rounding:
        ceil` and `floor` of SimplexLoRA) counts with its initial ranks.
        """
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def final(self, model: nn.Module) -> int | None:
        """The most parameters that can train after the last rank change, including the head's.

        None if that depends on what is learnt and has no useful bound.
        """
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    @property
    def exact_start(self) -> bool:
        """Whether attaching does not change the model's outputs, bit for bit."""
        return True

    @property
    def check_every(self) -> int:
        """Steps between two decisions about ranks, 0 for none."""
        return 0

    @property
    def search_steps(self) -> int | None:
        """The last step of a search for ranks; None if it goes on to the end, or there is no search."""
        return None

    @property
    def rewarm_steps(self) -> int:
        """Steps of linear warm-up after each rank change, 0 for none."""
        return 0

    @property
    def restart_step(self) -> int | None:
        """The step at which the learning-rate schedule starts again; None for never."""
        return None


def _exact(attach: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`attach`, followed by the method's first plan and a comparison of what trains with what the sites cost."""

    @wraps(attach)
    def checked(self: Method, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        keep_codes(model)
        attached = attach(self, model, head)
        if type(self).attach is checked:  # not when a subclass calls it with super()
            if (plan := self.first_plan(attached)) is not None:
                resize(attached, plan)
            _check_budget(self, attached, head)
        return attached

    return checked


def _check_budget(method: Method, model: nn.Module, head: Sequence[str]) -> None:
    """Raise InputError unless what trains is the head, scales, `beside` and r·in + r·out of every site.

    With frozen A a site costs r·out. Models without sites are not checked.
    """
    present = [site for site in sites(model) if site.present]
    if not present:
        return
    known = {id(p) for p in (*trained_scales(model), *method.beside(model))}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and any(f".{name}".endswith(f".{part}") for part in head):
            known.update(id(p) for p in module.parameters())
    costs = {
        id(getattr(site, factor)): site.rank * (site.in_features if factor == "A" else site.out_features)
        for site in present
        for factor in method.factors
    }
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in known}
    if unexpected := [name.rpartition(".")[0] for name, p in trained.items() if id(p) not in costs]:
        raise InputError(
            f"{unexpected[0]} trains but is no adapted layer ({len(unexpected)} such parameters): name other targets"
        )
    actual, expected = sum(p.numel() for p in trained.values()), sum(costs.values())
    if actual != expected or len(costs) != len(present) * len(method.factors):
        raise InputError(
            f"the adapted layers train {actual:,} parameters, but their ranks cost {expected:,}: name other targets"
        )


def adam_options(args: "TrainingArguments") -> tuple[float, tuple[float, float], float, float]:
    """Rate, betas, epsilon and weight decay.

    Raises:
        InputError: `args` ask for another optimizer than AdamW, or give it options, which would be ignored.
    """
    optim = getattr(args.optim, "value", args.optim)
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        raise InputError(f"optim={optim} would be ignored, since methods use their own AdamW: leave optim out")
    for option in ("optim_args", "optim_target_modules"):
        if getattr(args, option):
            raise InputError(f"{option}={getattr(args, option)!r} would be ignored: leave it out")
    return args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.weight_decay
