"""Several rows in one sequence, each as if it went through the model alone.

Positions start at 0 again with each row. From them transformers (`masking_utils.find_packed_sequence_indices`) sees
where rows begin, and lets no token attend to another row, provided that it is given neither a mask nor a cache. Not all
models ask it: some carry a state from token to token (Mamba, linear attention), others make their own mask. `check`
tries it out.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rankwise.errors import InputError
from rankwise.nets.undisturbed import undisturbed
from rankwise.processes import together
from rankwise.ranks.sites import base_of
from rankwise.tasks.base import Batch
from rankwise.tasks.generation import IGNORE


@dataclass(frozen=True)
class Pack:
    """Rows one after the other, T tokens in all; each of the tensors is (T,)."""

    ids: Tensor
    labels: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Packing:
    """How the rows of an optimizer step are packed.

    Attributes:
        most: tokens in a pack; a longer row is a pack of its own.
        joined: packs that pass through the model at once are one row of the batch, as FlashAttention needs it to see
            where rows begin.
    """

    most: int
    joined: bool = False

    def packs(self, batch: Batch) -> list[Pack]:
        """The rows of a decoder's padded batch, packed. The first token of a row has no label: nothing predicts it."""
        columns = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
        rows = []
        for ids, labels, real in zip(*columns, strict=True):
            labels = torch.cat([torch.tensor([IGNORE]), labels[real][1:]])
            rows.append((ids[real], labels, torch.arange(len(labels))))
        packed = best_fit([len(row[0]) for row in rows], self.most)
        return [Pack(*map(torch.cat, zip(*(rows[row] for row in pack), strict=True))) for pack in packed]

    def join(self, packs: Sequence[Pack]) -> dict[str, Any]:
        """A batch of packs, padded on the right; each token of the padding is a row of its own, without a label."""
        batch = {
            "input_ids": pad_sequence([pack.ids for pack in packs], batch_first=True),
            "labels": pad_sequence([pack.labels for pack in packs], batch_first=True, padding_value=IGNORE),
            "position_ids": pad_sequence([pack.positions for pack in packs], batch_first=True),
        }
        if self.joined:
            batch = {name: values.reshape(1, -1) for name, values in batch.items()}
        return {**batch, "use_cache": False}

    def check(self, model: nn.Module, tokens: Sequence[int], at_once: int = 2) -> None:
        """InputError unless rows of these tokens have the logits in packs that they have alone.

        The difference is compared with that of sequences which do not say where their rows begin. Takes less memory
        than a training with `at_once` packs at once.
        """
        draw, known = random.Random(0), sorted(set(tokens))
        half, third = self.most // 2, self.most // 3
        lengths = [half, third, self.most - half - third, third]  # a full pack, and one to be padded
        rows = [torch.tensor(draw.choices(known, k=length)) for length in lengths if length]
        ids, mask = (pad_sequence(each, batch_first=True) for each in (rows, [torch.ones_like(row) for row in rows]))
        packs = self.packs({"input_ids": ids, "labels": ids, "attention_mask": mask})[:at_once]
        name = type(base_of(model)).__name__
        with undisturbed(model):
            model.eval()
            try:
                differences = [*self._differences(model, packs)]
            except Exception as error:
                if together.out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())[:200]
                raise InputError(f"packing: {name} cannot read packed rows ({reason}): leave it out") from error
        packed, unmarked = torch.tensor(differences).amax(0).tolist()
        weights = [*model.parameters()]
        exact = not torch.is_autocast_enabled(weights[0].device.type) and all(p.dtype == torch.float32 for p in weights)
        if not packed <= (0.01 if exact else 0.1) * unmarked:  # nor if it is not a number
            raise InputError(f"packing: {name} does not keep rows apart that share a sequence: leave it out")

    def _differences(self, model: nn.Module, packs: Sequence[Pack]) -> Iterator[tuple[float, float]]:
        """For each row, how far its logits are from those that it has alone: in a pack, and in an unmarked sequence."""
        width = max(len(pack.ids) for pack in packs)
        batch = {key: value for key, value in self.join(packs).items() if key != "labels"}
        packed = _logits(model, **batch).flatten(0, 1).split(width)
        for pack, logits in zip(packs, packed, strict=True):
            unmarked = _logits(model, input_ids=pack.ids[None])[0]
            starts = [*(pack.positions == 0).nonzero().flatten().tolist(), len(pack.ids)]
            for row in map(slice, starts, starts[1:]):
                alone = _logits(model, input_ids=pack.ids[None, row])[0]
                yield _distance(logits[row], alone), _distance(unmarked[row], alone)


def best_fit(lengths: Sequence[int], most: int) -> list[list[int]]:
    """The numbers of the rows, in packs of at most `most` tokens; a longer row is a pack of its own.

    Best-fit decreasing: from the longest row to the shortest, each goes to the pack that it fills best.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens left in a pack, and its number; the fullest first
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        best = bisect_left(room, (lengths[row], 0))
        if best == len(room):
            room.append((most, len(packs)))
            packs.append([])
        left, pack = room.pop(best)
        packs[pack].append(row)
        insort(room, (left - lengths[row], pack))
    return packs


def _logits(model: Any, **batch: Any) -> Tensor:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    logits: Tensor = model(**inputs).logits
    return logits


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())
