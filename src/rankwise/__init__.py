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
    "Head": "rankwise.methods.subset",
    "LoRA": "rankwise.methods.lora",
    "SimplexLoRA": "rankwise.methods.simplex_lora",
    "SimplexAdam": "rankwise.optim",
    "RankCallback": "rankwise.train.callback",
    "RankTrainer": "rankwise.train.trainer",
    "load_checkpoint": "rankwise.train.checkpoint",
    "save_checkpoint": "rankwise.train.checkpoint",
    "RankPlan": "rankwise.ranks",
    "rank_report": "rankwise.ranks",
    "resize": "rankwise.ranks",
    "sites": "rankwise.ranks",
    "load": "rankwise.export",
    "save": "rankwise.export",
    "InputError": "rankwise.config",
}

__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from rankwise.config import InputError
    from rankwise.export import load, save
    from rankwise.methods.lora import LoRA
    from rankwise.methods.simplex_lora import SimplexLoRA
    from rankwise.methods.subset import Head
    from rankwise.optim import SimplexAdam
    from rankwise.ranks import RankPlan, rank_report, resize, sites
    from rankwise.train.callback import RankCallback
    from rankwise.train.checkpoint import load_checkpoint, save_checkpoint
    from rankwise.train.trainer import RankTrainer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
