"""LoRA (Hu et al. 2021, arXiv 2106.09685): h = W x + b + s B A x with s = α / r, and every layer the same rank."""

from collections.abc import Sequence
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from rankwise.config import InputError, nearest
from rankwise.methods.base import Method, require
from rankwise.ranks.resize import follow_state_dict
from rankwise.ranks.sites import features, is_weight

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRA(Method, name="lora"):
    """Low-rank adapters of one rank on every target: A Kaiming uniform, B = 0.

    Attributes:
        rank: r, of every site.
        alpha: α; the product BA is scaled by s = α / r.
        targets: `all-linear` (every linear layer but the output head), or names of modules, matched by their ends.
        dropout: share of the adapter's inputs that are zeroed in training.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | list[str] = ALL_LINEAR
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, f"rank must be at least 1, not {self.rank}")
        require(self.alpha > 0, f"alpha must be above 0, not {self.alpha}")
        require(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")

    def attach(self, model: nn.Module, head: Sequence[str] = ()) -> nn.Module:
        require(not isinstance(model, PeftModel), "this model has an adapter already: attach to the base model instead")
        names = target_names(model, self.targets, head)
        for name in names:
            limit = min(features(model.get_submodule(name)))
            require(self.rank <= limit, f"rank {self.rank} is too large for {name}, which allows at most {limit}")
        head_names(model, head)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
            target_modules=names,
            lora_dropout=self.dropout,
            modules_to_save=list(head) or None,
            fan_in_fan_out=not isinstance(model.get_submodule(names[0]), nn.Linear),
        )
        model = get_peft_model(model, config)
        follow_state_dict(model)
        return model


def target_names(model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
    """Full names of the linear layers that `targets` means; layers inside the head are never among them.

    Raises:
        InputError: no name at all, or one that matches nothing; the message lists what would.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    aside = [*head, *SEQ_CLS_HEAD_NAMES]
    linear = [
        name
        for name, module in model.named_modules()
        if is_weight(module) and module is not output and not any(_inside(part, name) for part in aside)
    ]
    require(bool(linear), f"{type(model).__name__} has no linear layer outside its head, so nothing can be adapted")
    if targets == ALL_LINEAR:
        return linear
    wanted = [targets] if isinstance(targets, str) else list(targets)
    require(bool(wanted), f"targets is empty: name modules, or {ALL_LINEAR}")
    for target in wanted:
        if not any(_ends(target, name) for name in linear):
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise InputError(
                f"target {target!r} matches no linear layer{nearest(target, ends)}; "
                f"these would match: {ALL_LINEAR}, {', '.join(ends)}"
            )
    return [name for name in linear if any(_ends(target, name) for target in wanted)]


def head_names(model: nn.Module, head: Sequence[str]) -> list[str]:
    """Full names of the modules that `head` means.

    Raises:
        InputError: a name that matches no module.
    """
    names = [name for name, _ in model.named_modules()]
    for part in head:
        if not any(_ends(part, name) for name in names):
            top = [name for name, _ in model.named_children()]
            raise InputError(f"head {part!r} matches no module{nearest(part, top)}; the model has: {', '.join(top)}")
    return [name for name in names if any(_ends(part, name) for part in head)]


def _ends(part: str, name: str) -> bool:
    """Whether the module `name` is called `part`, in full or by its last components."""
    return name == part or name.endswith(f".{part}")


def _inside(part: str, name: str) -> bool:
    """Whether the module `name` is called `part` or lies in one that is."""
    return f".{part}." in f".{name}."
