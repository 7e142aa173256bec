"""What the layers of an adapter read on data: the moments by which a cut loses least of what they add there."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters.layers import StoredAdapter
from rankwise.adapters.peft_folder import PREFIX
from rankwise.commands.ready import Ready
from rankwise.errors import InputError
from rankwise.runs import run_file
from rankwise.runs.use import SETTINGS
from rankwise.settings import complete
from rankwise.sweep.check import Source, load_run, schema
from rankwise.tasks import subset
from rankwise.train.arguments import computing


@torch.no_grad()
def roots(adapter: StoredAdapter, source: Source, settings: Sequence[str] = ()) -> dict[str, Tensor]:
    """L (r, r) of each layer, with L Lᵀ = Σ (Ax)(Ax)ᵀ / rows over the training rows of a configuration.

    The sum is over all positions of a row, so that ‖ΔW L‖² tells how much a layer changes in a row altogether. Padding
    is left out where a layer has one position for each token. A layer that no row reaches has 0.

    Args:
        source, settings: of a run, as for `train`: its task, `train_rows`, `batch_size` and model count, and what they
            leave out is as the adapter's own run had it.
    Raises:
        InputError: the adapter is no folder of PEFT's, or all that stands in the way of using it.
    """
    if adapter.config is None:
        raise InputError(
            f"{adapter.path}: is a single file, which PEFT does not load: give the folder of a PEFT adapter to cut it "
            "on data"
        )
    if isinstance(source, str | Path) and Path(source).is_dir():
        wanted = complete(run_file.load(Path(source)).config, schema())
    else:
        wanted = load_run(source, settings)
    given = wanted.model_dump(mode="json", include={*SETTINGS, "plugins"}, exclude_defaults=True)
    ready = Ready.of(adapter.path, [f"{key}={json.dumps(value)}" for key, value in given.items()])
    split = subset(ready.task.train(), wanted.train_rows)
    examples = list(ready.task.encode(split, ready.processor, ready.config.max_length))
    device = next(ready.model.parameters()).device
    found = {name: torch.zeros(adapter.rank(name), adapter.rank(name), dtype=torch.float64) for name in adapter.names}
    masks: list[Tensor | None] = [None]
    with ExitStack() as stack, computing(ready.config):
        collate = ready.task.collate(ready.model, ready.processor, ready.config.seed)
        for name, sums in found.items():
            stack.enter_context(_watched(ready.model.get_submodule(f"{PREFIX}{name}"), sums, masks))
        # encoder and decoder have padding in different places, and a row alone has none
        seq2seq = getattr(ready.model.config, "is_encoder_decoder", False)
        size = 1 if seq2seq else wanted.micro_batch or wanted.batch_size
        for start in range(0, len(examples), size):
            batch: dict[str, Any] = collate(examples[start : start + size])
            batch = {key: each.to(device) if isinstance(each, Tensor) else each for key, each in batch.items()}
            masks[0] = batch.get("attention_mask")
            ready.model(**batch)
    return {name: _root(sums / len(examples)) for name, sums in found.items()}


def _root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp_min(0).sqrt()


@contextmanager
def _watched(layer: Any, sums: Tensor, masks: list[Tensor | None]) -> Iterator[None]:
    """Within it, (Ax)(Ax)ᵀ of all inputs of PEFT's `layer` is added to `sums` (r, r)."""

    def add(reads: Tensor) -> None:
        mask = masks[0]
        if mask is not None and mask.shape == reads.shape[:-1]:
            reads = reads[mask.bool()]
        reads = reads.reshape(-1, reads.shape[-1]).double()
        sums.add_((reads.T @ reads).cpu())

    [adapter] = layer.active_adapters
    if adapter in layer.lora_embedding_A:
        A = layer.lora_embedding_A[adapter]
        handle = layer.register_forward_pre_hook(lambda _, inputs: add(A.T[inputs[0]]))
    else:
        channels = 1 if isinstance(layer.lora_A[adapter], nn.modules.conv._ConvNd) else -1
        handle = layer.lora_A[adapter].register_forward_hook(lambda _, inputs, out: add(out.movedim(channels, -1)))
    try:
        yield
    finally:
        handle.remove()
