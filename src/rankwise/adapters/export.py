"""`rankwise export`: an adapter, whoever trained it, in a form that a program reads right."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.adapters.consumers import Reading, max_lora_rank, stacked_with
from rankwise.adapters.layers import StoredAdapter
from rankwise.adapters.layouts import compact, ends_of, in_sglang, not_read, portable, targeted, unread
from rankwise.adapters.meta import base_of
from rankwise.adapters.stored import check_free, pad, stored
from rankwise.adapters.tensors import write_tensors
from rankwise.adapters.verify import Verified, verified
from rankwise.errors import InputError, require
from rankwise.files import replace_folder, unfinished

TARGETS = {
    **dict.fromkeys(("portable", "vllm", "sglang", "tgi"), "portable"),
    **dict.fromkeys(("peft", "llama.cpp"), "compact"),
    "diffusers": "diffusers",
}
"""What `--for` takes -> the layout that it is served with."""
PIPELINE = {
    "unet": re.compile(r"UNet\w*Model|(?:down_blocks|up_blocks|mid_block)\..+"),
    "text_encoder": re.compile(r"CLIPTextModel|text_model\..+"),
    "text_encoder_2": re.compile(r"CLIPTextModelWithProjection"),
    "transformer": re.compile(r"\w*Transformer\w*Model|(?:single_)?transformer_blocks\..+"),
}
"""A model of diffusers' pipelines -> the class that it has there, or how the names of its layers begin."""


@dataclass(frozen=True)
class Exported:
    """What `export_adapter` has written.

    Attributes:
        path: the folder, or the file for diffusers.
        layout: compact, portable or diffusers.
        ranks: of each layer, without padding.
        padded: the rank that all layers have in the file; 0 if each has its own.
        bytes: of the file of weights.
        not_served: programs that refuse it or, without an error, read other weights from it -> which of both.
        notes: what else to know.
        verified: how it differs from the adapter that was given; None if that was not asked for.
    """

    path: Path
    layout: str
    ranks: Mapping[str, int]
    padded: int
    bytes: int
    not_served: dict[str, Reading]
    notes: list[str]
    verified: Verified | None

    @property
    def max_lora_rank(self) -> int | None:
        """The smallest --max-lora-rank of vLLM; None for a file that is not for it, and where none is enough."""
        return None if self.layout == "diffusers" else max_lora_rank(self.padded or max(self.ranks.values()))

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "layout": self.layout,
            "layers": len(self.ranks),
            "ranks": [min(self.ranks.values()), max(self.ranks.values())],
            "padded": self.padded,
            "bytes": self.bytes,
            "max_lora_rank": self.max_lora_rank,
            "not_served": self.not_served,
            "notes": self.notes,
            "verified": self.verified and self.verified.as_json(),
        }

    def text(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        spread = f"all of rank {low}" if low == high else f"of ranks {low} to {high}"
        padded = f", padded to {self.padded}" if self.padded > low else ""
        lines = [f"{self.layout}: {len(self.ranks)} layers, {spread}{padded}, {self.bytes:,} bytes"]
        if self.max_lora_rank:
            lines.append(f"vLLM: --max-lora-rank {self.max_lora_rank}")
        for reading, what in (("wrong", "read wrongly, without an error, by"), ("refused", "not loaded by")):
            names = [name for name, how in self.not_served.items() if how == reading]
            lines += [f"{what}: {', '.join(names)}"] if names else []
        return "\n".join([*lines, *self.notes, *(self.verified.lines() if self.verified else [])])


def export_adapter(
    adapter: str | PathLike[str],
    out: str | PathLike[str],
    to: str = "portable",
    *,
    verify: bool = False,
    push: str | None = None,
    force: bool = False,
) -> Exported:
    """Write an adapter in a form that a program reads right.

    Args:
        adapter: a PEFT folder, a run with one, or a file of kohya's trainers, diffusers or ComfyUI.
        out: a folder; a name that ends in .safetensors for diffusers, and where `adapter` is such a file.
        to: peft, vllm, sglang, tgi, llama.cpp, diffusers, or portable for as many as possible.
        verify: compare ΔW of each layer, and the outputs in PEFT in a process of its own, with those of `adapter`.
        push: the name of a repository on the hub that takes the result.

    Raises:
        InputError: as `stored` and `stored.write`; `to` is not known, or does not read such an adapter at all; what was
            written is not the same as what was given; the hub refuses it.
    """
    require(to in TARGETS, f"{to!r} is not known: give one of {', '.join(TARGETS)}")
    out, like, notes = Path(out), stored(adapter), list[str]()
    layout = TARGETS[to]
    if like.config is None:
        if to not in ("portable", "diffusers"):
            raise InputError(f"{like.path}: adapts models of diffusion pipelines, which {to} does not load")
        layout = "diffusers"
    if key := unread(like, to):
        raise InputError(
            f"{like.path}: has {key} besides A and B, which {to} does not read: rankwise merge makes a model of all"
        )
    file = out.suffix == ".safetensors"
    if layout == "diffusers" and like.config is not None:
        require(file, f"{out}: diffusers reads one file; give a name that ends in .safetensors")
        require(force or not out.exists(), f"{out}: is there already; give another name, or --force to replace it")
    else:
        check_free(out, like, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(out, folder=True) as temporary:
        new = temporary / (out.name if file else "adapter")
        if layout == "compact":
            compact(new, like)
        elif like.config is None:
            portable(new, like)
        elif layout == "diffusers":
            _for_diffusers(new, like)
        else:
            base, why = base_of(like.config)
            if base:
                ends = ends_of(like.layers)
                ends += stacked_with(ends) if to == "sglang" else []
                portable(new, like, targeted(base, like.config, ends, like.path))
            else:
                notes.append(f"{why}: layers of rank 0 are assumed where other blocks have such a layer")
                portable(new, like)
        written = stored(new)
        if to == "sglang" and (fault := in_sglang(written)):
            tail = ", which its base model does not have" if base else f"; export can add it as zeros, but {why}"
            raise InputError(f"{like.path}: {fault[1]}{tail if fault[0] == 'refused' else ''}")
        report = verified(like, written, logits=layout != "diffusers") if verify else None
        if more := sorted({part for layer in like.layers.values() for part in layer.parts} - {"A", "B", "alpha"}):
            notes.append(f"its layers have a {' and a '.join(more)} too: not every program reads that")
        if like.others and like.config is not None:
            rest = f" and {len(like.others) - 1} more" if like.others[1:] else ""
            notes.append(f"besides its layers it has {like.others[0]}{rest}, which PEFT reads")
        done = Exported(
            out,
            layout,
            {name: layer.rank for name, layer in written.layers.items()},
            written.config["r"] if layout == "portable" and written.config else 0,
            sum(path.stat().st_size for path in written.tensors.files),
            {} if layout == "diffusers" else not_read(written),
            notes,
            report,
        )
        if file:
            new.replace(out)
        else:
            replace_folder(out, new)
    if push:
        from rankwise.adapters.hub import upload

        notes.append(f"on the hub: {upload(out, push)}")
    return done


def _for_diffusers(file: Path, like: StoredAdapter) -> None:
    """Write a PEFT adapter on one model of a pipeline as diffusers' pipelines load it.

    All layers have one rank, and the scales are in B: a file without alphas means the scale 1 to every version of
    diffusers only where all ranks are equal.
    """
    config = like.config or {}
    if like.others or any(layer.parts.keys() > {"A", "B"} or layer.embedding for layer in like.layers.values()):
        what = like.others[0] if like.others else "embeddings, biases or magnitudes"
        raise InputError(f"{like.path}: has {what}, for which a file of diffusers has no room")
    kind = str((config.get("auto_mapping") or {}).get("base_model_class") or "")
    part = next((part for part, name in PIPELINE.items() if name.fullmatch(kind)), None)
    if not kind:
        part = next((part for part, name in PIPELINE.items() if all(map(name.fullmatch, like.layers))), None)
    if part is None:
        raise InputError(f"{like.path}: adapts {kind or 'a model'} that is no model of diffusers' pipelines")
    rank = max(layer.rank for layer in like.layers.values())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in like.layers:
            factors, dtype = like.factors(name), like.tensors.dtype[like.layers[name].parts["B"]]
            A, B = pad(factors.A, 0, rank), pad(factors.B.float() * factors.scale, 1, rank).to(dtype)
            yield f"{part}.{name}.lora_A.weight", A.reshape(rank, -1, *factors.kernel)
            yield f"{part}.{name}.lora_B.weight", B.reshape(*B.shape, *(1 for _ in factors.kernel))

    write_tensors(file, tensors(), lambda: {"format": "pt"})
