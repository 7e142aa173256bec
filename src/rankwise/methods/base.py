"""A method decides where rank goes; the rank engine acts. One method is one file in this folder."""

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
from rankwise.ranks.resize import resize
from rankwise.ranks.scales import trained_scales
from rankwise.runs.search import Search

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class Method(Named, ABC, kind="method"):
    """One way to spend trainable parameters on a frozen model. Its fields are the YAML options.

    It has no state: whatever must survive a restart is a tensor on the model, so resuming needs no hook.
    """

    whole: ClassVar[bool] = False
    """Whether all weights of the model train, so that any other method can go on from what it leaves."""
    sizes: ClassVar[tuple[str, ...]] = ()
    """The options that say how much trains, which the budget of a run chooses where none of them is given; the first is
    the one that is counted up. Empty for a method that is as large as its model makes it."""

    factors: ClassVar[str] = "AB"
    """Which factors of its sites train, for a method that has sites."""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "attach" in vars(cls):
            cls.attach = _exact(cls.attach)  # type: ignore[method-assign]

    @abstractmethod
    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        """Freeze `model` and add what trains. The modules named in `head` stay trainable and are saved whole.

        Raises:
            InputError: also where what trains afterwards is not exactly what the sites cost; see `beside`.
        """

    def first_plan(self, model: nn.Module) -> RankPlan | None:
        """The ranks that the sites begin with, where `attach` has given them others; carried out right after it."""
        return None

    def beside(self, model: nn.Module) -> list[nn.Parameter]:
        """What trains besides the factors of the sites, their scales and the head: DoRA's magnitudes, for instance."""
        return []

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Disjoint groups over everything that trains, in model order. No weight decay on biases and norms."""
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
            InputError: where `args` ask for another optimizer than AdamW, or give it options.
        """
        return SimplexAdam(self, model, *adam_options(args))

    def before_step(self, model: nn.Module) -> None:  # noqa: B027 - most methods have nothing to do here
        """Called right before each optimizer step, with all gradients there: for terms that no loss function has."""

    def after_step(self, model: nn.Module, step: int, lr: float) -> RankPlan | None:
        """Called once after each optimizer step: prox or projection of scales in place, and new ranks when they change.

        What a plan says is carried out afterwards, whole or not at all, so nothing of it may be done here.

        Args:
            step: steps taken, the first being 1.
            lr: the size of this step of ω or the gates, 0 while they stand still: their rate, or that of their clock;
                the rate of the first group where there are none.
        """
        return None

    def search(self, model: nn.Module, moved: float | None = None) -> Search | None:
        """What the search for ranks has come to by now, asked before `fold`; None for a method that learns none.

        Args:
            moved: what its last plan has said (`RankPlan.moved`), None where there was none. An optimizer knows it:
                `SimplexAdam.search`.
        """
        return self._changed(ranks(model))

    def _changed(self, now: Mapping[str, int]) -> Search | None:
        """How many of the ranks by site are not what they began with."""
        if not self.check_every or not self.sizes or not now:
            return None
        begun = getattr(self, self.sizes[0])
        return Search(sum(rank != begun for rank in now.values()), len(now))

    def last_plan(self, model: nn.Module) -> RankPlan:
        """How the model becomes plain LoRA with unchanged outputs, at any time; `fold` carries it out."""
        return RankPlan({}, fold=True)

    def fold(self, model: nn.Module) -> nn.Module:
        """To plain LoRA with unchanged outputs, in place: every scale moves into its factors."""
        if sites(model):
            resize(model, self.last_plan(model))
        return model

    def weights(self, model: nn.Module) -> dict[str, float] | None:
        """ω by site while a search is on, else None."""
        return None

    def budget(self, model: nn.Module) -> int:
        """Adapter parameters that the method, just attached, may end with: what uniform ranks cost; 0 without ranks."""
        return rank_report(model).total

    def sized(self, size: int) -> "Method":
        """This method at another size, 1 or more; the larger, the more trains."""
        return replace(self, **{self.sizes[0]: size})

    def peak(self, model: nn.Module) -> int:
        """The most parameters that train at once, the head's among them, on a model just attached.

        What is searched with counts too: ω, gates, ranks to be cut. A search that may take more rank than it began with
        (`rounding: ceil` and `floor` of SimplexLoRA) is counted as it begins.
        """
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def final(self, model: nn.Module) -> int | None:
        """The most parameters that can be left to train once the structure has settled, the head's among them.

        None where that depends on what is learnt and has no bound worth naming.
        """
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    @property
    def exact_start(self) -> bool:
        """Whether attaching leaves the model's outputs as they were, bit for bit."""
        return True

    @property
    def check_every(self) -> int:
        """Steps between two looks at what the method learns about ranks, 0 for never."""
        return 0

    @property
    def search_steps(self) -> int | None:
        """The step after which a search for ranks is over; None where it goes on to the end, or there is none."""
        return None

    @property
    def rewarm_steps(self) -> int:
        """Steps of linear warm-up after each rank change, 0 for none."""
        return 0

    @property
    def restart_step(self) -> int | None:
        """The step at which the learning-rate schedule starts again, None for never."""
        return None


Attach = Callable[..., nn.Module]


def _exact(attach: Attach) -> Attach:
    """`attach`, then the method's first plan, and what trains is compared with what the sites cost.

    No method can leave that out.
    """

    @wraps(attach)
    def checked(self: Method, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        attached = attach(self, model, head)
        if type(self).attach is checked:  # and not one that a subclass goes on from
            if (plan := self.first_plan(attached)) is not None:
                resize(attached, plan)
            _check_budget(self, attached, head)
        return attached

    return checked


def _check_budget(method: Method, model: nn.Module, head: Sequence[str]) -> None:
    """Raise InputError unless all that trains is the head, scales, what lies `beside` and r·in + r·out of every site.

    Where A is frozen a site costs r·out. Models without sites are left alone.
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
    if strange := [name.rpartition(".")[0] for name, p in trained.items() if id(p) not in costs]:
        raise InputError(f"{strange[0]} trains and is no site ({len(strange)} such parameters): name other targets")
    counted, due = sum(p.numel() for p in trained.values()), sum(costs.values())
    if counted != due or len(costs) != len(present) * len(method.factors):
        raise InputError(f"the sites train {counted:,} parameters where their ranks cost {due:,}: name other targets")


def adam_options(args: "TrainingArguments") -> tuple[float, tuple[float, float], float, float]:
    """Rate, betas, epsilon and weight decay.

    Raises:
        InputError: where `args` ask for another optimizer than AdamW, or give it options: nobody would read them.
    """
    optim = getattr(args.optim, "value", args.optim)
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        raise InputError(f"optim={optim} would not be used: methods step by an AdamW of their own; leave optim out")
    for option in ("optim_args", "optim_target_modules"):
        if getattr(args, option):
            raise InputError(f"{option}={getattr(args, option)!r} would not be read: leave it out")
    return args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.weight_decay
