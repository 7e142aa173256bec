"""Adapters with mixed ranks in llama.cpp itself: its logits against PEFT's, for each layout of an adapter.

    make clients                                   # builds llama.cpp, some minutes
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/clients.py

A search on SmolLM2-135M moves rank between layers. Its adapter is saved in each layout, converted with llama.cpp's own
`convert_lora_to_gguf.py`, and run on the de-quantised weights in fp32 and on the package's Q4_1 file. Printed is the
largest difference of a logit from PEFT's, as a share of the largest change that the adapter makes to a logit. The
adapter merged into its base by `rankwise merge --gguf` is run too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

CLIENTS = Path(__file__).parent.parent / ".venv-clients"
PYTHON = CLIENTS / "bin" / "python"
TEXT = "The search that this adapter comes from moves rank between the layers of a small model while it learns."


def llama_logits(model: str, ids: str, adapter: str, out: str) -> None:
    """Write the logits (tokens, vocabulary) that llama.cpp computes; run by PYTHON, which has no torch."""
    import llama_cpp
    import numpy as np

    tokens = json.loads(ids)
    fp32 = {"type_k": 0, "type_v": 0, "flash_attn": False}  # keys and values would be rounded to fp16
    llm = llama_cpp.Llama(
        model, n_ctx=len(tokens), n_threads=1, logits_all=True, lora_path=adapter or None, verbose=False, **fp32
    )
    llm.eval(tokens)
    np.save(out, llm.scores[: len(tokens)])


def trained(base: Path, folder: Path, steps: int) -> list[int]:
    """Save the adapter of a short search in `folder` / patterns, compact, portable; the tokens to compare on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import rankwise as rw

    torch.manual_seed(0)
    ids = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_cache=False)
    method = rw.SimplexLoRA(rank=4, targets="all-linear", every=max(1, steps // 3), times=2, omega_rate=1000)
    model = method.attach(model)
    optimizer = rw.SimplexAdam(method, model, lr=2e-3)
    rows = torch.tensor([ids, ids[::-1]])
    for _ in range(steps):
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.search()
    model = method.fold(model)
    assert len({site.rank for site in rw.sites(model)}) > 3, rw.rank_report(model)
    rw.save(model, folder / "compact")
    model.save_pretrained(folder / "patterns")  # PEFT's own
    rw.export_adapter(folder / "compact", folder / "portable", to="portable")
    return ids


def differences(folder: Path, steps: int = 12) -> Mapping[str, tuple[float, float]]:
    """Largest difference from PEFT, and largest effect of the adapter, by what was run in llama.cpp."""
    import numpy as np
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import rankwise as rw
    from rankwise.train.gguf import _embedded, folder_of

    os.environ.update(LLAMA_CPP=str(source()), PYTHONPATH=str(CLIENTS / "converter"))  # of the converters
    base, quantised = folder_of("smollm2"), str(_embedded())
    ids = trained(base, folder, steps)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        plain = model(torch.tensor([ids])).logits[0].numpy()
        model = PeftModel.from_pretrained(model, folder / "patterns").eval()
        expected = model(torch.tensor([ids])).logits[0].numpy()
    wrong = folder / "wrong"  # by a half
    rw.export_adapter(folder / "compact", wrong, to="llama.cpp")
    config = json.loads((wrong / "adapter_config.json").read_text())
    (wrong / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1.5 * config["lora_alpha"]}))
    f32 = convert("convert_hf_to_gguf.py", base, folder / "base.gguf")
    merged = rw.merge(folder / "compact", folder / "merged", gguf=True).gguf
    files = {
        name: convert("convert_lora_to_gguf.py", folder / name, folder / f"{name}.gguf", "--base", str(base))
        for name in ("patterns", "compact", "portable", "wrong")
    }

    def logits(model: str, adapter: str = "") -> "np.ndarray":
        out = folder / "logits.npy"
        command = [PYTHON, __file__, "--llama", model, json.dumps(ids), adapter, str(out)]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        return np.load(out)

    def largest(one: "np.ndarray", two: "np.ndarray") -> float:
        return float(np.abs(one - two).max())

    effect = largest(expected, plain)
    found = {"no adapter": (largest(logits(f32), plain), effect)}
    for name, file in files.items():
        found[name] = largest(logits(f32, file), expected), effect
    found["merged"] = largest(logits(str(merged)), expected), effect
    codes = logits(quantised)
    found["no adapter, Q4_1"] = largest(codes, plain), effect
    for name in ("compact", "portable"):
        found[f"{name}, Q4_1"] = largest(logits(quantised, files[name]), expected), effect
    return found


def source() -> Path:
    """The source of llama.cpp that `make clients` has built."""
    return next(CLIENTS.glob("source/*/vendor/llama.cpp"))


def convert(program: str, folder: Path, out: Path, *more: str) -> str:
    """Run one of llama.cpp's converters, in fp32."""
    command = [sys.executable, source() / program, folder, "--outfile", out, "--outtype", "f32", *more]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return str(out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--llama"]:
        llama_logits(*sys.argv[2:])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of the search")
    steps = parser.parse_args().steps
    if not PYTHON.exists():
        sys.exit("there is no llama.cpp here: make clients")
    with tempfile.TemporaryDirectory() as name:
        print("| in llama.cpp | largest Δ logit from PEFT | share of the adapter's effect |\n|---|---|---|")
        for what, (difference, effect) in differences(Path(name), steps).items():
            print(f"| {what} | {difference:.2g} | {100 * difference / effect:.2g} % |")
        print(f"\nthe adapter changes a logit by {effect:.3g} at most")
