"""Time, memory and error of `rankwise resize` on an adapter of the shape of Llama-2-7B: 224 layers at rank 64.

    python benchmarks/resize.py /tmp/resize --dtype float32 --full 4

The adapter is random: singular values of each layer fall as k^-0.7, and layers differ in their norm by a factor of e
(one standard deviation). Each budget is one process of its own, whose CPU time on all cores and peak memory are
printed. `--full N` compares N layers with a singular value decomposition of the whole product, which takes minutes.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from json import dumps, loads
from pathlib import Path

import torch
from torch import Tensor

from rankwise.adapters.cut import spectrum, truncated
from rankwise.adapters.stored import stored
from rankwise.adapters.tensors import write_tensors

RANK, BLOCKS = 64, 32
SIZES = {  # (in, out)
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.gate_proj": (4096, 11008),
    "mlp.up_proj": (4096, 11008),
    "mlp.down_proj": (11008, 4096),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--full", type=int, default=0, metavar="N", help="layers to decompose in full")
    asked = parser.parse_args()
    adapter = asked.folder / f"adapter-{asked.dtype}"
    if not adapter.exists():
        make(adapter, getattr(torch, asked.dtype), asked.blocks)
    whole = asked.blocks * RANK * sum(map(sum, SIZES.values()))
    size = (adapter / "adapter_model.safetensors").stat().st_size
    print(
        f"{len(SIZES) * asked.blocks} layers, rank {RANK}, {whole:,} parameters, {size / 2**20:.0f} MiB, {asked.dtype}"
    )
    print("budget        parameters   error  uniform cut  CPU s  wall s  peak MiB")
    for part in (2, 4, 8, 16):
        out = asked.folder / f"out-{asked.dtype}-{part}"
        command = ["resize", str(adapter), "--budget", str(whole // part), "-o", str(out), "--force", "--json"]
        began = time.perf_counter()
        shown, cpu, peak = child([sys.executable, "-m", "rankwise", *command])
        wall, done = time.perf_counter() - began, loads(shown)
        uniform = done["uniform"][1] ** 0.5
        print(
            f"1/{part:<4} {done['parameters']:>17,}  {done['error']:>6.2%}  {uniform:>11.2%}  {cpu:>5.1f}  {wall:>6.1f}"
            f"  {peak / 1024:>8.0f}",
            flush=True,
        )
    for name in stored(adapter).names[: asked.full]:
        factors = stored(adapter).factors(name)
        began = time.process_time()
        ours, new = spectrum(factors), truncated(factors, 16)
        ours_s, began = time.process_time() - began, time.process_time()
        product = factors.B.float() @ factors.A.float() * factors.scale
        U, S, V = torch.linalg.svd(product, full_matrices=False)
        full_s = time.process_time() - began
        best = float(torch.linalg.matrix_norm(product - (U[:, :16] * S[:16]) @ V[:16]))
        got = float(torch.linalg.matrix_norm(product - factors.scale * new.B.float() @ new.A.float()))
        off = float((torch.from_numpy(ours.gains).sqrt() - S[: len(ours.gains)]).abs().max() / S[0])
        print(
            f"{name} {tuple(product.shape)}: error at rank 16 {got:.6f}, of a full SVD {best:.6f}; singular values "
            f"differ by {off:.1e} of the largest; {ours_s:.2f} CPU s, full SVD {full_s:.0f}",
            flush=True,
        )


def child(command: list[str]) -> tuple[str, float, int]:
    """What a process prints, its CPU seconds, and its peak memory in KiB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(getattr(after, part) - getattr(before, part) for part in ("ru_utime", "ru_stime"))
    return shown, cpu, after.ru_maxrss


def make(folder: Path, kind: torch.dtype, blocks: int) -> None:
    """A random adapter in PEFT's format."""
    draw = torch.Generator().manual_seed(0)
    falling = torch.arange(1, RANK + 1) ** -0.7

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for block in range(blocks):
            for name, (inputs, outputs) in SIZES.items():
                strength = torch.randn((), generator=draw).exp()
                A = torch.randn(RANK, inputs, generator=draw) / inputs**0.5
                B = torch.randn(outputs, RANK, generator=draw) / outputs**0.5 * falling * strength
                for part, value in (("A", A), ("B", B)):
                    yield f"base_model.model.model.layers.{block}.{name}.lora_{part}.weight", value.to(kind)

    folder.mkdir(parents=True)
    write_tensors(folder / "adapter_model.safetensors", tensors(), lambda: {"format": "pt"})
    targets = [name.rpartition(".")[2] for name in SIZES]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(dumps(config))


if __name__ == "__main__":
    main()
