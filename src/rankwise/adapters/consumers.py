"""Programs that load LoRA adapters, and what each makes of the layouts that an adapter can be saved in.

`patterns` is what PEFT writes: factors as trained, `rank_pattern` and `alpha_pattern`. `compact` has the scales in B,
so that one alpha is enough, and `rank_pattern`. `portable` has one rank for all layers, padded with zeros, and no
pattern. `gaps` leaves layers out and has one rank for those that are there, which needs no pattern either.
docs/adapters.md says how each was tried.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Layout = Literal["patterns", "compact", "gaps", "portable"]
Reading = Literal["right", "refused", "wrong"]
"""`refused`: an error when the adapter is loaded. `wrong`: other weights than the trained ones, without an error."""


@dataclass(frozen=True)
class Consumer:
    """A program that loads adapters.

    Attributes:
        name: with the versions that it is true of.
        target: the name that `rankwise export --for` knows it by.
        patterns, compact, portable: how it reads an adapter with mixed ranks in that layout.
        gaps: how it reads an adapter of one rank on some of the layers of each name.
        why: what decides it, a short sentence.
    """

    name: str
    target: str
    patterns: Reading
    compact: Reading
    gaps: Reading
    portable: Reading
    why: str

    def reads(self, layout: Layout) -> Reading:
        return getattr(self, layout)


CONSUMERS = (
    Consumer("PEFT", "peft", "right", "right", "right", "right", "the reference"),
    Consumer(
        "PEFT's hotswap_adapter up to 0.21",
        "portable",
        "refused",
        "wrong",
        "refused",
        "right",
        "wants equal alpha patterns and no new layers, and scales every layer by lora_alpha / r",
    ),
    Consumer("transformers", "peft", "right", "right", "right", "right", "its load_adapter is PEFT"),
    Consumer("axolotl", "peft", "right", "right", "right", "right", "loads and merges through PEFT"),
    Consumer(
        "Unsloth", "peft", "right", "right", "right", "right", "loads through PEFT; its MLX code reads both patterns"
    ),
    Consumer("vLLM 0.32 and newer", "vllm", "right", "right", "right", "right", "reads both patterns"),
    Consumer(
        "vLLM up to 0.31",
        "vllm",
        "right",
        "wrong",
        "right",
        "right",
        "scales every layer by lora_alpha / r and ignores both patterns",
    ),
    Consumer(
        "SGLang",
        "sglang",
        "refused",
        "refused",
        "refused",
        "right",
        "q, k and v must have the rank r; q needs v, k and v need q, up needs gate",
    ),
    Consumer(
        "TGI and LoRAX",
        "tgi",
        "wrong",
        "wrong",
        "wrong",
        "right",
        "drop all layers of a name of which one is missing, and scale by lora_alpha / the padded r",
    ),
    Consumer(
        "llama.cpp", "llama.cpp", "wrong", "right", "right", "right", "scales by lora_alpha / the rank of the tensor"
    ),
    Consumer(
        "diffusers", "diffusers", "refused", "refused", "refused", "refused", "wants files of its own, with other names"
    ),
    Consumer("ComfyUI", "diffusers", "wrong", "wrong", "wrong", "wrong", "ignores names that it does not know"),
    Consumer("mlx-lm", "mlx", "refused", "refused", "refused", "refused", "wants files of its own, with other names"),
)

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank of vLLM takes."""
PUNICA_BLOCK = 16
"""TGI and LoRAX pad ranks to 8 or to a multiple of this, and then scale by lora_alpha / the padded rank."""
HEADS: dict[str, tuple[str, ...]] = {"vllm": ("classifier", "score"), "sglang": (), "tgi": (), "llama.cpp": ()}
"""Programs that read A and B alone -> modules whose whole weights they read besides."""
BLOCK = re.compile(r"layers\.(\d+)\.")
"""By which SGLang finds the block of a layer."""
STACKED = {
    "q_proj": "v_proj",
    "k_proj": "q_proj",
    "v_proj": "q_proj",
    "up_proj": "gate_proj",
    "kv_a_proj_with_mqa": "q_a_proj",
}
"""The last part of a layer's name -> that of the layer without which SGLang, which stacks both, loads no adapter."""


def stacked_with(ends: Iterable[str]) -> list[str]:
    """The last parts of the names of layers that must be added to layers with these, for SGLang to load them."""
    have = {*ends}
    while more := {STACKED[end] for end in have & STACKED.keys()} - have:
        have |= more
    return sorted(have - {*ends})


def sglang_fault(layers: Iterable[str], zeros: Iterable[str]) -> tuple[Reading, str] | None:
    """How SGLang fails to read an adapter of one rank, and why; None if it reads it right.

    It knows a layer by the number of its block and the last part of its name.

    Args:
        layers: the names of the layers.
        zeros: the names of those in the file that have rank 0.
    """
    layers, slots = dict.fromkeys(layers), dict[tuple[str, ...], str]()
    for name in layers:
        if not BLOCK.search(name) and name.rpartition(".")[2] not in ("embed_tokens", "lm_head"):
            return "wrong", f"SGLang ignores {name}, whose name has no layers.NUMBER"
    names = layers | dict.fromkeys(filter(BLOCK.search, zeros))
    for name in names:
        experts = re.findall(r"experts\.\d+\.|shared_experts\.", name)
        slot = (*BLOCK.findall(name)[:1], *experts, name.rpartition(".")[2])
        if (other := slots.setdefault(slot, name)) != name:
            return "wrong", f"SGLang takes {other} and {name} for one layer"
    for name in names:
        block, _, end = name.rpartition(".")
        if end in STACKED and f"{block}.{STACKED[end]}" not in names:
            return "refused", f"SGLang needs {STACKED[end]} next to {name}"
    return None


def not_served(layout: Layout) -> list[Consumer]:
    """The consumers that do not read an adapter of mixed ranks right in this layout, the silently wrong ones first."""
    found = [consumer for consumer in CONSUMERS if consumer.reads(layout) != "right"]
    return sorted(found, key=lambda consumer: consumer.reads(layout) != "wrong")


def portable_rank(largest: int) -> int:
    """The rank to pad to: the smallest that TGI and LoRAX leave as it is on one GPU."""
    return 8 if largest <= 8 else -(-largest // PUNICA_BLOCK) * PUNICA_BLOCK


def max_lora_rank(largest: int) -> int | None:
    """The smallest --max-lora-rank of vLLM for adapters of this rank, None if it has none."""
    return next((rank for rank in VLLM_RANKS if rank >= largest), None)
