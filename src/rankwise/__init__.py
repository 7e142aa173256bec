"""rankwise: learn during LoRA fine-tuning where rank is worth its parameters.

>>> import rankwise as rw
>>> method = rw.SimplexLoRA(rank=8, every=10, times=3)
>>> model = method.attach(model, head=["classifier"])
>>> rw.RankTrainer(method=method, model=model, args=args, train_dataset=data).train()
>>> rw.save(model, "adapter")  # stock PEFT loads it
>>> rw.compare("experiment.yaml").verdicts  # what `rankwise compare experiment.yaml` does
"""

import ast
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The public names, looked up on first use: `rankwise --help` need not wait for torch.
if TYPE_CHECKING:
    from rankwise.adapters import load, save
    from rankwise.adapters.beside import base_digest
    from rankwise.adapters.export import export_adapter
    from rankwise.api import compare, data, evaluate, predict, report, retry, shrink, suggest, task, train
    from rankwise.commands.merge import merge
    from rankwise.commands.ranks import adapter_ranks
    from rankwise.commands.resize import mix, resize_adapter
    from rankwise.errors import InputError
    from rankwise.methods.adalora import AdaLoRA
    from rankwise.methods.adapter import AdapterH, AdapterL
    from rankwise.methods.dora import DoRA
    from rankwise.methods.fat_lora import FatLoRA
    from rankwise.methods.fourierft import FourierFT
    from rankwise.methods.ia3 import IA3
    from rankwise.methods.lora import LoRA
    from rankwise.methods.lora_fa import LoRAFA
    from rankwise.methods.pissa import PiSSA
    from rankwise.methods.prefix import PreEmbed, PreLayer
    from rankwise.methods.random_lora import RandomLoRA
    from rankwise.methods.simplex_lora import SimplexLoRA
    from rankwise.methods.sora import SoRA
    from rankwise.methods.spaced_lora import SpacedLoRA
    from rankwise.methods.squeeze import Squeeze
    from rankwise.methods.subset import BitFit, Full, FullTop, Head, Untrained
    from rankwise.methods.tinylora import TinyLoRA
    from rankwise.methods.vb_lora import VBLoRA
    from rankwise.methods.vera import VeRA
    from rankwise.methods.weight_lora import WeightLoRA
    from rankwise.nets.gated import Gated
    from rankwise.nets.lean import lean
    from rankwise.nets.lora_linear import fast
    from rankwise.optim import SimplexAdam
    from rankwise.processes.together import average_gradients
    from rankwise.ranks import RankPlan, rank_report, resize, sites
    from rankwise.runs.use import Use
    from rankwise.train.bare_loop import load_checkpoint, save_checkpoint
    from rankwise.train.callback import RankCallback
    from rankwise.train.trainer import RankTrainer


def _public() -> dict[str, str]:
    """Public name -> the module that has it, as the imports above say."""
    source = ast.parse(Path(__file__).read_text(encoding="utf-8")).body
    imports = [each for block in source if isinstance(block, ast.If) for each in block.body]
    return {
        alias.name: str(each.module) for each in imports if isinstance(each, ast.ImportFrom) for alias in each.names
    }


_PUBLIC = _public()
__all__ = [*_PUBLIC, "__version__"]  # noqa: PLE0604


class Room(ModuleType):
    """A package that is called as a function is: `rw.train(config)` trains one run by the code in `rankwise.train`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(import_module("rankwise.api"), self.__name__.rpartition(".")[2])(*args, **options)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
