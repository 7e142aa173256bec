"""Time and memory of a step with PEFT's LoRA layer and with the fast one, next to the least that a step can take.

    OMP_NUM_THREADS=1 python benchmarks/layer.py                     # one layer: shapes, ranks, tokens
    OMP_NUM_THREADS=1 python benchmarks/layer.py --of bert llama     # whole models: MiniLM's shape, a small decoder

A step is a forward and a backward pass. The limit is that of the frozen layer or model with gradients of its inputs,
and 6 r (in + out) operations of each adapter for each token, at the speed of a product measured in the same run. All
take turns in one process. A row has the medians of the ratios of a round; `--json FILE` writes their quartiles too.
`added` and `summed` are the two ways of the fast layer, and `fast` is the one that its rule takes. The time is that of
this process, whatever else the machine does, and on a GPU that of the clock.
"""

import argparse
import itertools
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from measures import DEVICE, kept, over, timed
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rankwise.nets import lora_linear
from rankwise.ranks import sites

LAYERS = ["384x384", "384x1536", "1536x384", "512x512", "512x2048", "1024x1024"]
MODELS: dict[str, Any] = {
    "bert": transformers.BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    ),
    "llama": transformers.LlamaConfig(
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=1376,
        vocab_size=1000,
        num_labels=2,
    ),
}
WAYS = {"peft": None, "added": math.inf, "summed": 0.0, "fast": lora_linear.SUM_FROM}
"""Each way, with the value of SUM_FROM at which the fast layer takes it."""
LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", nargs="*", default=LAYERS, help=f"layers as in x out, or {', '.join(MODELS)}")
    parser.add_argument("--rank", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048], help=f"in rows of {LENGTH}")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    titles = [
        "of",
        "rank",
        "tokens",
        "A",
        *(f"{way} ÷ limit" for way in WAYS),
        "fast ÷ peft",
        "MB kept by peft",
        "by fast",
    ]
    print("|", " | ".join(titles), "|\n|", "---|" * len(titles), sep="", flush=True)
    rows = []
    for what, rank, tokens, A in itertools.product(asked.of, asked.rank, asked.tokens, ("trained", "frozen")):
        ratios, ratio, sizes = measured(what, rank, tokens, A == "frozen", asked.dropout, asked.rounds)
        row = {"of": what, "rank": rank, "tokens": tokens, "A": A}
        rows.append({**row, "over limit": ratios, "fast over peft": ratio, "bytes kept": sizes})
        cells = [
            *(f"{ratios[way][1]:.2f}" for way in WAYS),
            f"{ratio[1]:.2f}",
            *(f"{size / 1e6:.1f}" for size in sizes),
        ]
        print("|", " | ".join(map(str, [*row.values(), *cells])), "|", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"device": device(), "torch": torch.__version__, "rows": rows}, indent=1))


def measured(
    what: str, rank: int, tokens: int, frozen: bool, dropout: float, rounds: int
) -> tuple[Any, Any, list[int]]:
    """Quartiles of each way over the limit and of fast over PEFT, and the bytes that both keep."""
    torch.manual_seed(0)
    model, call = adapted(what, tokens, LoraConfig(r=rank, lora_dropout=dropout, target_modules="all-linear"))
    own = 0
    for site in sites(model):
        nn.init.normal_(site.B, std=0.02)
        if frozen:
            site.layer.frozen_peft_weight_names = {site.adapter: ("lora_A",)}  # as rw.LoRAFA does
        own += 6 * rank * site.cost * tokens
    x, W = torch.randn(tokens, 512, device=DEVICE), torch.randn(512, 512, device=DEVICE)
    often = 1 if what in MODELS else max(1, int(2e8 / (tokens * math.prod(map(int, what.split("x"))))))
    seconds: dict[str, list[float]] = {name: [] for name in ("limit", "product", *WAYS)}
    for again in range(rounds + 1):  # the first is not counted
        for name, measures in seconds.items():
            use(model, name)
            spent = timed((lambda: x @ W) if name == "product" else lambda: step(model, call), often)
            if again:
                measures.append(spent)
    of_product = own / (2 * tokens * 512 * 512)
    least = [a + of_product * b for a, b in zip(seconds["limit"], seconds["product"], strict=True)]
    ratios = {way: over(seconds[way], least) for way in WAYS}
    sizes = []
    for way in ("peft", "fast"):
        use(model, way)
        sizes.append(kept(model, lambda: call(model)))
    return ratios, over(seconds["fast"], seconds["peft"]), sizes


def adapted(what: str, tokens: int, config: LoraConfig) -> tuple[Any, Callable[[Any], Tensor]]:
    """A layer or a model with an adapter, and a call of it whose output has gradients for its inputs."""
    if what in MODELS:
        base: Any = transformers.AutoModelForSequenceClassification.from_config(MODELS[what])
        base.config.pad_token_id = 0
        base.enable_input_require_grads()
        ids = torch.randint(1, 1000, (max(1, tokens // LENGTH), min(tokens, LENGTH)), device=DEVICE)
        return get_peft_model(base.to(DEVICE), config).train(), lambda model: model(input_ids=ids).logits
    inputs, outputs = map(int, what.split("x"))
    config.target_modules = {"0"}
    x = torch.randn(tokens, inputs, device=DEVICE, requires_grad=True)
    base = nn.Sequential(nn.Linear(inputs, outputs)).to(DEVICE)
    return get_peft_model(base, config).train(), lambda model: model(x)


def device() -> str:
    """The name of the processor or the GPU."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or platform.machine()])[0]


def use(model: Any, name: str) -> None:
    """Let the model compute in the way `name`, or without its adapter."""
    model.base_model.enable_adapter_layers() if name in WAYS else model.base_model.disable_adapter_layers()
    threshold = WAYS.get(name)
    lora_linear.fast(model, on=threshold is not None)
    if threshold is not None:
        lora_linear.SUM_FROM = threshold


def step(model: Any, call: Callable[[Any], Tensor]) -> None:
    y = call(model)
    y.backward(torch.ones_like(y))
    model.zero_grad()


if __name__ == "__main__":
    main()
