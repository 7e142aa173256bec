"""What is saved next to an adapter's weights: the tokenizer's files, and a digest that tells the base weights apart."""

import copy
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rankwise.files import TOKENIZER

SAMPLE = 256
"""Values of a tensor that count for the digest."""


def base_digest(model: nn.Module, head: Sequence[str] = ()) -> str:
    """16 hex digits that change with the base weights, before a method is attached; `head` does not count.

    Of each parameter its shape and SAMPLE values, evenly spaced; of large models all would take minutes. It does not
    depend on the names of the parameters, on how they are spread over files, or on the device.
    """
    parts = []
    for name, parameter in model.named_parameters():
        if not f"{name}.".startswith(tuple(f"{part}." for part in head)):
            flat = parameter.detach().flatten()
            values = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].float().cpu().numpy()
            parts.append(hashlib.sha256(repr(tuple(parameter.shape)).encode() + values.tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:16]


def write_tokenizer(tokenizer: Any, model: Any, folder: Path) -> None:
    """Write the tokenizer into the adapter's folder, without what its last call has set.

    None is written where PEFT's `AutoPeftModelFor…` would add rows for its tokens to the base model, and none that
    consists of other files than TOKENIZER: it is then that of the base model.
    """
    own = copy.deepcopy(tokenizer)
    if (backend := getattr(own, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
    table = model.get_input_embeddings()
    if table is None or len(own) > table.weight.shape[0]:
        return
    with tempfile.TemporaryDirectory() as name:
        own.save_pretrained(name)
        files = [*Path(name).iterdir()]
        if all(file.name in TOKENIZER for file in files):
            for file in files:
                (folder / file.name).write_bytes(file.read_bytes())
