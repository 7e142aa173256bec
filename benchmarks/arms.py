"""The steps that `benchmarks/suite.py` compares: PEFT's, those of every registered method, and the least possible.

A step is a forward and a backward pass and a step of the optimizer. The limit is that of the frozen model with
gradients for its inputs and a head that trains; to its time belong LoRA's own products, 6 r (in + out) operations for
each token at the speed of a product measured in the same round, and one fused step of AdamW over as many numbers as
LoRA trains.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from layer import LENGTH, MODELS, device
from measures import DEVICE, timed
from memory import resident
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn

import rankwise as rw
from rankwise import methods
from rankwise.errors import InputError
from rankwise.methods.peer import Peer
from rankwise.nets.lora_linear import set_fast
from rankwise.ranks.resize import resize
from rankwise.train.model import train_in_fp32

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
"""Of the weights of the base, and that in which layers compute; adapters and heads are fp32."""
SHAPES = MODELS | {
    f"llama-{width}": transformers.LlamaConfig(
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=width // 128,
        intermediate_size=width * 11 // 4,
        vocab_size=1000,
        num_labels=2,
    )
    for width in (2048, 4096)
}
RATE = 1e-4
LATE = 10_000
"""A step after the last one that is measured."""
SEARCHES = {"every": LATE, "times": 2, "start": 1, "settle": 1, "total": 2 * LATE}
"""Options, of the methods that have them, with which their ranks do not change while they are measured."""


@dataclass
class Arm:
    """A model and what a step of it needs."""

    model: Any
    optimizer: torch.optim.Optimizer
    after: Callable[[int], None] = lambda step: None
    """Called after each step with its number."""
    steps: int = 0
    updates: list[float] = dataclasses.field(default_factory=list)
    """Seconds of the optimizer in each step."""

    def step(self, batch: Mapping[str, Tensor]) -> float:
        """Carry out a step; its seconds."""
        passes = timed(lambda: self.passes(batch))
        self.updates.append(timed(self.update))
        return passes + self.updates[-1]

    def passes(self, batch: Mapping[str, Tensor]) -> None:
        self.loss(batch).backward()

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        with computing():
            loss: Tensor = self.model(**batch).loss
        return loss

    def update(self) -> None:
        self.optimizer.step()
        self.steps += 1
        self.after(self.steps)  # AdaLoRA reads gradients
        self.optimizer.zero_grad()


def computing() -> AbstractContextManager[Any]:
    return torch.autocast(DEVICE, DTYPE, enabled=DEVICE == "cuda")


def rows(tokens: int) -> dict[str, Tensor]:
    """So many tokens in rows of LENGTH, with a label each."""
    count = max(1, tokens // LENGTH)
    ids = torch.randint(1, 1000, (count, min(tokens, LENGTH)), device=DEVICE)
    return {"input_ids": ids, "labels": torch.arange(count, device=DEVICE) % 2}


def base(config: Any) -> Any:
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForSequenceClassification.from_config(config).to(DEVICE, DTYPE).train()
    model.config.pad_token_id = 0
    model.enable_input_require_grads()
    return model


def head(config: Any) -> list[str]:
    return ["classifier"] if config.model_type == "bert" else ["score"]


class Limit(Arm):
    """The frozen model, and as many numbers for AdamW as LoRA trains."""

    def __init__(self, config: Any, rank: int, batch: Mapping[str, Tensor]) -> None:
        model = base(config).requires_grad_(False)
        for name in head(config):
            model.get_submodule(name).requires_grad_(True)
        train_in_fp32(model)
        adapted = lora(config, rank).model
        sites = rw.sites(adapted)
        self.flat = nn.Parameter(torch.zeros(rank * sum(site.cost for site in sites), device=DEVICE))
        self.gradient = torch.randn_like(self.flat)
        trained = [self.flat, *(p for p in model.parameters() if p.requires_grad)]
        super().__init__(model, torch.optim.AdamW(trained, lr=RATE, fused=True))
        read = _tokens(sites, adapted, batch)
        self.own = 6 * rank * sum(site.cost * tokens for site, tokens in zip(sites, read, strict=True))
        """Operations of LoRA's own products in a step."""
        self.batch, tokens = batch, batch["input_ids"].numel()
        self.x, self.W = (torch.randn(rows, 512, device=DEVICE, dtype=DTYPE) for rows in (tokens, 512))

    def turns(self) -> dict[str, Callable[[], float]]:
        """What has to be timed in each round."""
        return {"limit": lambda: self.step(self.batch), "product": lambda: timed(lambda: self.x @ self.W, often=10)}

    def least(self, seconds: Mapping[str, list[float]]) -> list[float]:
        """The least that a step of LoRA could take, by round."""
        of_product = self.own / (2 * self.x.shape[0] * 512 * 512)
        return [a + of_product * b for a, b in zip(seconds["limit"], seconds["product"], strict=True)]

    def update(self) -> None:
        self.flat.grad = self.gradient
        super().update()


def _tokens(sites: Any, model: Any, batch: Mapping[str, Tensor]) -> list[int]:
    """How many tokens each site reads in a step."""
    read: dict[str, int] = {}

    def note(name: str) -> Any:
        return lambda module, given, out: read.update({name: out.numel() // out.shape[-1]})

    hooks = [site.layer.register_forward_hook(note(site.name)) for site in sites]
    with torch.no_grad(), computing():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return [read[site.name] for site in sites]


# --- PEFT


def _options(config: Any, rank: int) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 16, "target_modules": "all-linear", "modules_to_save": head(config)}


def _adam(model: Any) -> torch.optim.Optimizer:
    train_in_fp32(model)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)


def lora(config: Any, rank: int, **more: Any) -> Arm:
    model = get_peft_model(base(config), LoraConfig(**_options(config, rank), **more))
    return Arm(model, _adam(model))


def dora(config: Any, rank: int) -> Arm:
    return lora(config, rank, use_dora=True)


def lora_fa(config: Any, rank: int) -> Arm:
    model = lora(config, rank).model
    return Arm(model, create_lorafa_optimizer(model, r=rank, lora_alpha=16, lr=RATE))


def adalora(config: Any, rank: int) -> Arm:
    """It scores units of rank in every step, as in its search, and all of them stay while it is measured."""
    ranks = {"init_r": rank, "target_r": rank // 2, "tinit": 1, "tfinal": 1, "deltaT": LATE, "total_step": 2 * LATE}
    own = AdaLoraConfig(**{key: value for key, value in _options(config, rank).items() if key != "r"} | ranks)
    model = get_peft_model(base(config), own)
    return Arm(model, _adam(model), lambda step: model.base_model.update_and_allocate(step))


def compiled(config: Any, rank: int) -> Arm:
    arm = lora(config, rank)
    arm.model.compile()
    return arm


def full(config: Any, rank: int) -> Arm:
    model = base(config)
    return Arm(model, _adam(model))


# --- rankwise


def options(name: str, rank: int, count: int) -> dict[str, Any]:
    """Options with which a method searches at `rank` in all of `count` sites as long as it is measured."""
    fields = {field.name for field in dataclasses.fields(methods.registry()[name])}
    wanted = SEARCHES | {"rank": rank, "keep": count}
    if "init_rank" in fields:
        wanted |= {"rank": rank // 2, "init_rank": rank}
    return {"name": name, **{key: value for key, value in wanted.items() if key in fields}}


def ours(config: Any, rank: int, name: str, fast: bool = True) -> Arm:
    bare = base(config)
    count = sum(isinstance(module, nn.Linear) for module in bare.modules()) - len(head(config))
    method = methods.build(options(name, rank, count))
    model = method.attach(bare, head=head(config))
    train_in_fp32(model)
    set_fast(model, fast)
    return Arm(model, rw.SimplexAdam(method, model, lr=RATE))


def lean(config: Any, rank: int) -> Arm:
    arm = ours(config, rank, "lora")
    rw.lean(arm.model)
    return arm


def shrunk(config: Any, rank: int) -> Arm:
    """Every other site empty, the others at half the rank."""
    arm = ours(config, rank, "lora")
    resize(arm.model, {site.name: 0 if n % 2 else rank // 2 for n, site in enumerate(rw.sites(arm.model))})
    return arm


def searched() -> list[str]:
    """The registered methods with a rank whose step is not LoRA's own: a start alone makes no other step.

    Without those that are PEFT's in every part: there is no step of ours to measure, and not every shape can have them.
    """
    found = []
    for name, kind in sorted(methods.registry().items()):
        if issubclass(kind, Peer):
            continue
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        if "rank" in defaults and defaults.get("init", "kaiming") == "kaiming" and name != "lora":
            found.append(name)
    return found


Make = Callable[[Any, int], Arm]
PEFT: dict[str, Make] = {
    "PEFT LoRA": lora,
    "PEFT LoRA-FA": lora_fa,
    "PEFT AdaLoRA": adalora,
    "PEFT DoRA": dora,
    "full fine-tuning": full,
}
if DEVICE == "cuda":
    PEFT["PEFT LoRA, compiled"] = compiled


def every() -> dict[str, Make]:
    """All arms but the limit."""
    own: dict[str, Make] = {
        "lora": lambda config, rank: ours(config, rank, "lora"),
        "lora, fast: false": lambda config, rank: ours(config, rank, "lora", fast=False),
        "lora, lean": lean,
    }
    for name in searched():
        own[name] = lambda config, rank, name=name: ours(config, rank, name)
    return PEFT | own | {"lora, shrunk": shrunk}


@contextmanager
def peak() -> Iterator[list[int]]:
    """Context that ends with the bytes by which the memory in use grew at most."""
    grown: list[int] = []
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield grown
        grown.append(torch.cuda.max_memory_allocated() - before)
        return
    if not Path("/proc/self/clear_refs").exists():
        raise InputError("memory is measured on Linux and on GPUs: name the other parts")
    before = resident("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    yield grown
    grown.append(resident("VmHWM:") - before)


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return {
        "device": device(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **versions,
    }
