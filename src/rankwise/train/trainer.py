"""The Hugging Face Trainer with a rankwise method in it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import unwrap_peft_model

from rankwise.methods import Method
from rankwise.train.callback import RankCallback


class RankTrainer(Trainer):
    """A Trainer that trains with `method`: its optimizer, its rank changes, exact resume.

    Args:
        method: the method that `model` was attached with.
        **kwargs: everything a Trainer takes.
    """

    def __init__(self, *args: Any, method: Method, **kwargs: Any):
        self.method = method
        super().__init__(*args, **kwargs)
        # transformers leaves the scaling of accumulated gradients to every model whose forward takes **kwargs, but only
        # the losses of causal language models look at them. With the others gradients would grow with the number of
        # accumulation steps, which Adam does not mind, and clipping, ω and gates do.
        if type(unwrap_peft_model(self.model)).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            self.model_accepts_loss_kwargs = False
        self.add_callback(RankCallback(method))

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


class EpochSampler(Sampler[int]):
    """A length-grouped order that depends on the seed and the epoch alone.

    The Trainer's own draws from the global stream at the start of an epoch, which a resume in mid-epoch cannot repeat.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        # Not the sum: with it, seed 1 in its first epoch would see what seed 0 sees in its second.
        self.sampler.generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        return iter(self.sampler)


def restarting_schedule(optimizer: Optimizer, args: TrainingArguments, steps: int, restart: int) -> LambdaLR:
    """The schedule of `args` over all `steps`, begun anew at step `restart` over what is left (`finish: restart`)."""

    def share(total: int) -> Callable[[int], float]:
        alone = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # get_scheduler rescales the optimizer that it is given
        made = get_scheduler(args.lr_scheduler_type, alone, args.get_warmup_steps(total), total)
        if not isinstance(made, LambdaLR):
            raise ValueError(f"finish=restart cannot restart the schedule {args.lr_scheduler_type}")
        return made.lr_lambdas[0]

    first, second = share(steps), share(max(1, steps - restart))
    return LambdaLR(optimizer, lambda step: first(step) if step < restart else second(step - restart))
