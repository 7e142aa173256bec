"""What `train/test_devices.py` has two processes do, all of it in one launch: `side_by_side.py FOLDER`.

Each part trains in float64, where the order of sums shows in the last digits alone, and main writes what came of it.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments, default_data_collator

import methods
import models
import rankwise as rw
from rankwise.methods import Method, build
from rankwise.processes import together
from rankwise.processes.stop import Stop
from rankwise.ranks import ranks
from rankwise.train.trainer import RunTrainer

State = dict[str, torch.Tensor]
STEPS = 6
FOUND = {"lora": "lora", "dora": "dora", "simplex-lora": "lora", "sora": "lora"}
"""By which method what another has found is trained on."""
SEARCH = {"name": "simplex-lora", "rank": 2, "every": 2, "times": 2, "omega_rate": 200.0}


def bare(dropout: float = 0.0) -> torch.nn.Module:
    base = models.model()
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return base


def attached(method: Method, dropout: float = 0.0) -> torch.nn.Module:
    """The tiny BERT with the method on it, in float64."""
    base = bare(dropout)
    torch.manual_seed(1)
    return method.attach(base, head=models.head()).double()


def learnt(model: torch.nn.Module) -> State:
    found = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value.clone() for name, value in found.items()}


def trained(method: Method, folder: Path, micro_batch: int, dropout: float = 0.0) -> torch.nn.Module:
    """After two epochs of 7 + 7 + 1 rows: in the last step of each, one of two processes has no row."""
    args = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=7, learning_rate=1e-2, seed=3, max_grad_norm=0.5,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        remove_unused_columns=False,
    )  # fmt: skip
    model = attached(method, dropout)
    RunTrainer(
        micro_batch=micro_batch, stop=Stop(), method=method, model=model, args=args, train_dataset=models.rows(15),
        data_collator=default_data_collator,
    ).train()  # fmt: skip
    return model


def every_one(folder: Path, micro_batch: int) -> dict[str, State]:
    """What every registered method has learnt."""
    return {
        name: learnt(trained(methods.method(name), folder, micro_batch))
        for name in sorted(methods.registry().keys() - {"none"})
    }


def merging(folder: Path, micro_batch: int) -> State:
    """What a search leaves that adds the product of a site to W where its rank becomes 0."""
    model = trained(build({**SEARCH, "rank": 1, "omega_rate": 2e4, "empty": "merge"}), folder, micro_batch)
    assert not all(ranks(model).values())
    return {**learnt(model), "logits": models.logits(model)}


def by_hand(wrap: Callable[[torch.nn.Module], torch.nn.Module], average: bool, rewrap: bool) -> torch.nn.Module:
    """A bare loop through a search; each process takes every second row."""
    method = build(SEARCH)
    model = attached(method)
    optimizer = rw.SimplexAdam(method, model, lr=1e-2)
    here, many = (torch.distributed.get_rank(), 2) if together.count() > 1 else (0, 1)
    wrapped = wrap(model).train()
    for step in range(STEPS):
        rows = {name: value[here::many] for name, value in models.batch(seed=step).items()}
        wrapped(**rows).loss.backward()
        if average:
            rw.average_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        if rewrap and optimizer.changed == optimizer.steps:
            wrapped = wrap(model).train()
    return model


def found_adapter(folder: Path, name: str) -> None:
    """An adapter of the method as a search leaves it, of uneven ranks, some of them 0; DoRA has none."""
    method = methods.method(name)
    model = method.fold(attached(method))
    least = 1 if name == "dora" else 0
    rw.resize(model, {site: least + place % 3 for place, site in enumerate(ranks(model))})
    rw.save(model, folder, layout="compact")


def sharded(adapter: Path, saved: Path, name: str, shard: bool) -> tuple[State, torch.Tensor]:
    """What training a found adapter on gives, as docs/devices.md says it, and the logits of what is saved after it."""
    model = PeftModel.from_pretrained(bare(), str(adapter), is_trainable=True).double()
    here, many = 0, 1
    if shard:
        here, many = torch.distributed.get_rank(), 2
        for layer in model.get_base_model().bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
    optimizer = rw.SimplexAdam(methods.method(name), model, lr=1e-2)
    model.train()
    for step in range(STEPS):
        rows = {name: value[here::many] for name, value in models.batch(seed=step).items()}
        model(**rows).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if here == 0:
        whole = PeftModel.from_pretrained(bare(), str(adapter), is_trainable=True).double()
        whole.load_state_dict(state)
        rw.save(whole, saved)
    together.wait()
    return learnt(model), models.logits(rw.load(bare(), saved))


def refusal(do: Callable[[], Any]) -> str:
    try:
        do()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def shard_a_search() -> None:
    method = build(SEARCH)
    model = attached(method)
    fully_shard(model)
    rw.SimplexAdam(method, model)


def main(folder: Path) -> None:
    together.join()
    assert together.count() == 2
    found: dict[str, Any] = {"methods": every_one(folder, micro_batch=2)}
    found["merged"] = merging(folder, micro_batch=2)
    # with dropout the random streams of the processes part, and so would the fresh factors of a rank change
    model = trained(build({**SEARCH, "omega_rate": 2000.0}), folder, 7, dropout=0.3)
    found["ranks"] = ranks(model)
    found["alike"] = together.agree(str([value.tolist() for value in learnt(model).values()]), torch.device("cpu"))
    found["averaged"] = learnt(by_hand(lambda model: model, average=True, rewrap=False))
    found["wrapped anew"] = learnt(by_hand(DistributedDataParallel, average=False, rewrap=True))
    careless = lambda model: DistributedDataParallel(model, find_unused_parameters=True)  # noqa: E731
    found["wrapped once"] = refusal(lambda: by_hand(careless, average=False, rewrap=False))
    if torch.distributed.get_rank() == 0:
        for name in FOUND:
            found_adapter(folder / name, name)
    together.wait()
    found["sharded"] = {
        name: sharded(folder / name, folder / f"{name} after", then, shard=True) for name, then in FOUND.items()
    }
    found["sharded search"] = refusal(shard_a_search)
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    together.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
