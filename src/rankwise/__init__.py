"""rankwise: learn during LoRA fine-tuning where rank is worth its parameters.

>>> import rankwise as rw
>>> method = rw.SimplexLoRA(rank=8, every=10, times=3)
>>> model = method.attach(model, head=["classifier"])
>>> rw.RankTrainer(method=method, model=model, args=args, train_dataset=data).train()
>>> rw.save(model, "adapter")  # stock PEFT loads it
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> where it lives. Looked up on first use, so that `rankwise --help` need not wait for torch.
_PUBLIC = {
    "AdaLoRA": "rankwise.methods.adalora",
    "AdapterH": "rankwise.methods.adapter",
    "AdapterL": "rankwise.methods.adapter",
    "BitFit": "rankwise.methods.subset",
    "DoRA": "rankwise.methods.dora",
    "FatLoRA": "rankwise.methods.fat_lora",
    "Full": "rankwise.methods.subset",
    "FullTop": "rankwise.methods.subset",
    "Head": "rankwise.methods.subset",
    "LoRA": "rankwise.methods.lora",
    "LoRAFA": "rankwise.methods.lora_fa",
    "PiSSA": "rankwise.methods.pissa",
    "PreEmbed": "rankwise.methods.prefix",
    "PreLayer": "rankwise.methods.prefix",
    "RandomLoRA": "rankwise.methods.random_lora",
    "SimplexLoRA": "rankwise.methods.simplex_lora",
    "SoRA": "rankwise.methods.sora",
    "WeightLoRA": "rankwise.methods.weight_lora",
    "SimplexAdam": "rankwise.optim",
    "average_gradients": "rankwise.processes.together",
    "Gated": "rankwise.nets.gated",
    "RankCallback": "rankwise.train.callback",
    "RankTrainer": "rankwise.train.trainer",
    "load_checkpoint": "rankwise.train.bare_loop",
    "save_checkpoint": "rankwise.train.bare_loop",
    "RankPlan": "rankwise.ranks",
    "rank_report": "rankwise.ranks",
    "resize": "rankwise.ranks",
    "sites": "rankwise.ranks",
    "load": "rankwise.adapters",
    "save": "rankwise.adapters",
    "InputError": "rankwise.errors",
}

__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from rankwise.adapters import load, save
    from rankwise.errors import InputError
    from rankwise.methods.adalora import AdaLoRA
    from rankwise.methods.adapter import AdapterH, AdapterL
    from rankwise.methods.dora import DoRA
    from rankwise.methods.fat_lora import FatLoRA
    from rankwise.methods.lora import LoRA
    from rankwise.methods.lora_fa import LoRAFA
    from rankwise.methods.pissa import PiSSA
    from rankwise.methods.prefix import PreEmbed, PreLayer
    from rankwise.methods.random_lora import RandomLoRA
    from rankwise.methods.simplex_lora import SimplexLoRA
    from rankwise.methods.sora import SoRA
    from rankwise.methods.subset import BitFit, Full, FullTop, Head
    from rankwise.methods.weight_lora import WeightLoRA
    from rankwise.nets.gated import Gated
    from rankwise.optim import SimplexAdam
    from rankwise.processes.together import average_gradients
    from rankwise.ranks import RankPlan, rank_report, resize, sites
    from rankwise.train.bare_loop import load_checkpoint, save_checkpoint
    from rankwise.train.callback import RankCallback
    from rankwise.train.trainer import RankTrainer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
