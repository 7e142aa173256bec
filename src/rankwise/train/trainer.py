"""The Hugging Face Trainer with a rankwise method."""

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import LengthGroupedSampler, safe_globals

from rankwise.adapters import card, save
from rankwise.errors import InputError
from rankwise.methods import Method
from rankwise.methods.base import adam_options
from rankwise.nets import chunked_loss, lean
from rankwise.nets.undisturbed import undisturbed
from rankwise.nets.virtual_tokens import VirtualTokens
from rankwise.optim.simplex_adam import SHARDED
from rankwise.processes import together
from rankwise.processes.launched import LostError
from rankwise.processes.stop import Stop
from rankwise.tasks import Task
from rankwise.train.callback import MethodCallback
from rankwise.train.packing import Packing
from rankwise.train.scaling import scales


class RankTrainer(Trainer):
    """A Trainer that trains with `method`: its optimizer, its rank changes, exact resume.

    Under `accelerate launch` or `torchrun` each process computes gradients from its share of the rows, and they are
    averaged before the step. The model is not wrapped in DistributedDataParallel, which does not survive a rank change.

    Args:
        method: the method that was attached to `model`.
        **kwargs: the arguments of a Trainer.
    """

    def __init__(self, *args: Any, method: Method, **kwargs: Any):
        self.method = method
        super().__init__(*args, **kwargs)
        adam_options(self.args)  # to fail now, not when the training starts
        if self.optimizer_cls_and_kwargs is not None:
            raise InputError(
                "optimizer_cls_and_kwargs would be ignored, since methods use their own AdamW: leave it out"
            )
        # whether it is known if the loss is scaled; a subclass may declare it (in this version of transformers)
        self._scaling_known = getattr(self, "loss_is_scaled_for_ga", None) is not None
        self.add_callback(MethodCallback(method))
        if (sharded := self.is_fsdp_enabled or self.is_deepspeed_enabled) and method.check_every:
            raise InputError(SHARDED)
        self._data_parallel = together.count() > 1 and not sharded
        if self._data_parallel:
            plain = partial(self.accelerator.prepare_model, evaluation_mode=True)  # does not wrap the model
            vars(self.accelerator)["prepare_model"] = plain

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self._data_parallel and self.model is not None:
            together.spread([*self.model.parameters(), *self.model.buffers()])
        return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        if items is None or self._scaling_known:
            return batches, items
        self._set_scaling(batches[0])
        return batches, self._get_num_items_in_batch(batches, self.args.device)

    def _set_scaling(self, batch: Any) -> None:
        """Find out whether the loss divides itself by the number of accumulated batches; if not, the Trainer does.

        If neither does, gradients grow with the number of batches, which changes clipping, ω and gates, though not
        Adam.
        """
        counted = self._get_num_items_in_batch([batch], self.args.device)

        def loss(items: int) -> float:
            with undisturbed(self.model_wrapped), self.compute_loss_context_manager():
                self.model_wrapped.train()
                inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self._prepare_inputs(batch).items()}
                counts = torch.full_like(torch.as_tensor(counted), items)
                value: Any = self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=counts)
                return float(value.mean())

        scaled = scales(loss, int(torch.as_tensor(counted).flatten()[0]))
        yes, no = together.total(self.args.device, scaled is True, scaled is False)
        self._scaling_known = bool(yes or no)
        if no and self.compute_loss_func is None:
            self.model_accepts_loss_kwargs = False
        elif no and self.compute_loss_func is not None:
            compute = self.compute_loss_func

            def divided(*args: Any, **kwargs: Any) -> Tensor:
                training = self.model is not None and self.model.training
                return compute(*args, **kwargs) / (self.current_gradient_accumulation_steps if training else 1)

            self.compute_loss_func = divided

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        if self._data_parallel and self.accelerator.sync_gradients:
            together.average_gradients(model)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.label_smoother is not None:  # it does not pass labels to the model
            for module in model.modules():
                if isinstance(module, VirtualTokens) and module.generates:
                    module.labels = inputs.get("labels")
        return super().compute_loss(model, inputs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what the Trainer writes, but the adapter as `rankwise.save` does: folded to plain LoRA.

        A checkpoint keeps the live state. Its configuration says so, and PEFT does not load it.

        Raises:
            InputError: no adapter can contain what was learnt; see `rankwise.save`.
        """
        checkpoint = _internal_call and output_dir is not None  # a push to the hub gives no folder
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        ours = any(type(module).__module__.startswith("rankwise.") for module in model.modules())
        if not checkpoint and isinstance(model, PreTrainedModel) and ours:
            raise InputError(
                f"a plain {type(model).__name__} cannot load what {self.method.name} has added to it: save it with "
                "rankwise.save(model, folder, method, head)"
            )
        if checkpoint or sharded or not self.args.should_save or not isinstance(model, PeftModel):
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        users = card.users(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as name:
            adapter = save(model, Path(name) / "adapter")
            super().save_model(str(folder), _internal_call=True)
            for file in adapter.rglob("*"):
                if file.is_file() and not (users and file.name == card.CARD):
                    file.replace(folder / file.name)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load a checkpoint's random streams: the first process's if it was written by fewer or more processes."""
        own = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        names = [Path(checkpoint) / name for name in ("rng_state.pth", "rng_state_0.pth")] if checkpoint else []
        first = next((file for file in names if file.is_file()), None)
        if first is None or first.with_name(own).is_file():
            super()._load_rng_state(checkpoint)
            return
        with safe_globals():
            state = torch.load(first, weights_only=True)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["cpu"])

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            assert self.model is not None
            self.optimizer = self.method.optimizer(self.model, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None and self.method.restart_step is not None:
            optimizer = optimizer or self.create_optimizer()
            self.lr_scheduler = restarting_schedule(optimizer, self.args, num_training_steps, self.method.restart_step)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return EpochSampler(sampler, self.args.data_seed if self.args.data_seed is not None else self.args.seed)
        return sampler


class Piece(NamedTuple):
    """Rows that go through the model together."""

    batch: dict[str, Any]
    items: int
    """The number of rows or tokens that the loss of the batch averages."""


class RunTrainer(RankTrainer):
    """The Trainer of a run: an optimizer step has `per_device_train_batch_size` rows in total.

    The rows of a step, their order and the weight of each row or token in the loss do not depend on the number of
    processes or the size of the pieces, so gradients and losses differ only by the order of sums.

    Args:
        micro_batch: rows, or packs of them, that a process takes at once.
        stop: gets `agreed` set at each step: whether any of the processes was asked to stop.
        packing: how the rows of a step that a process takes are packed; None leaves them as they are.
        **kwargs: the arguments of a RankTrainer.
    """

    def __init__(self, *, micro_batch: int, stop: Stop, packing: Packing | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.micro_batch, self.stop, self.packing = micro_batch, stop, packing
        self._weight = 1.0

    def keep_less(self, task: Task) -> None:
        """Train with `activation_memory: lean`."""
        assert self.model is not None
        writes = task.family == "generation"
        lean.put_on(self.model, writes)
        if writes and self.label_smoother is not None:
            smoother: Any = chunked_loss.Smoothed(self.args.label_smoothing_factor)
            self.label_smoother = smoother

    def get_train_dataloader(self) -> DataLoader:
        assert self.train_dataset is not None
        loader: Any = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            sampler=self._get_train_sampler(),
            collate_fn=self._pieces,
            pin_memory=self.args.dataloader_pin_memory,
        )
        # by default accelerate repeats rows to make all shares equally large
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=False)

    def _pieces(self, rows: Sequence[dict[str, Any]]) -> list[Piece]:
        """This process's share of the rows of one step, in pieces of `micro_batch`; it may be empty."""
        index, count = self.args.process_index, self.args.world_size
        share: Sequence[Any] = rows[len(rows) * index // count : len(rows) * (index + 1) // count]
        collate: Callable[..., dict[str, Any]] = self.data_collator
        if self.packing is not None and share:
            share, collate = self.packing.packs(self.data_collator(list(share))), self.packing.join
        pieces = [share[start : start + self.micro_batch] for start in range(0, len(share), self.micro_batch)]
        batches = [collate(list(piece)) for piece in pieces]
        return [Piece(batch, items(batch)) for batch in batches]

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # not used, and slow to count

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Loss and gradients of all rows of a step; an error in one process is raised in all."""
        loss = torch.zeros((), device=self.args.device)
        [counted] = together.total(self.args.device, sum(piece.items for piece in inputs))
        failure: Exception | None = None
        try:
            for piece in inputs:
                self._weight = piece.items / counted * self.args.world_size
                loss += Trainer.training_step(self, model, dict(piece.batch))
        except Exception as error:
            if self.args.world_size == 1:
                raise
            failure = error
        memory, failed = together.out_of_memory(failure), failure is not None
        asked, short, broken = together.total(self.args.device, self.stop.asked, memory, failed)
        self.stop.agreed = asked > 0
        if short:
            raise together.ShortError(str(failure or "in another process")) from failure
        if failure is not None:
            raise failure
        if broken:
            raise LostError("another process of this run has failed: see its error")
        together.average_gradients(model)
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(*args, **kwargs)
        return self._weight * loss


def items(batch: Mapping[str, Tensor]) -> int:
    """What a loss averages over: tokens that are not ignored if a row has several labels, else rows.

    A decoder predicts each token from those before it, so the label of the first counts for nothing.
    """
    labels = batch["labels"]
    if labels.dim() != 2:
        return len(labels)
    predicted = labels if "decoder_input_ids" in batch else labels[:, 1:]
    return int((predicted != -100).sum())


class EpochSampler(Sampler[int]):
    """A length-grouped order that depends only on the seed and the epoch.

    The Trainer's own uses the global random stream at the start of an epoch, so a resume within it cannot repeat it.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        # Not the sum, or the first epoch of seed 1 would have the order of the second epoch of seed 0.
        self.sampler.generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        return iter(self.sampler)


def restarting_schedule(optimizer: Optimizer, args: TrainingArguments, steps: int, restart: int) -> LambdaLR:
    """The schedule of `args` over all `steps`, restarted at step `restart` over the rest (`finish: restart`)."""

    def share(total: int) -> Callable[[int], float]:
        dummy = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)  # get_scheduler changes its optimizer's rates
        options: Any = args.lr_scheduler_kwargs
        schedule = get_scheduler(args.lr_scheduler_type, dummy, args.get_warmup_steps(total), total, options)
        if not isinstance(schedule, LambdaLR):
            name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
            raise InputError(f"finish=restart cannot restart the schedule {name}: choose another lr_scheduler_type")
        return schedule.lr_lambdas[0]

    first, second = share(steps), share(max(1, steps - restart))
    return LambdaLR(optimizer, lambda step: first(step) if step < restart else second(step - restart))
