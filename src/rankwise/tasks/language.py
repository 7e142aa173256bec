"""The family of tasks whose rows are tokens of which a decoder learns some: the answers of conversations, or all.

`encode` gives rows of `input_ids` and `labels` of the same length: a label is the token itself, or IGNORE where nothing
is learnt. The loss is the mean over the tokens that are learnt, each predicted from those before it.
"""

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rankwise.errors import InputError, NotFiniteError, need
from rankwise.metrics import METRICS
from rankwise.nets.virtual_tokens import VirtualTokens
from rankwise.tasks import decoding
from rankwise.tasks.agreement import agree, check_rows, context
from rankwise.tasks.base import Batch, Evaluation, Scored, Split, Task, evaluating
from rankwise.tasks.generation import IGNORE, batches, check_direction, inner_model, pad_token, padded, settings

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

SAMPLES = 8
"""Rows of an evaluation split for which an answer is written."""
LONGEST_SAMPLE = 128
"""Tokens of such an answer."""


class Row(NamedTuple):
    """A row for the model.

    Attributes:
        idx: the place in the split of the row that it is, or of the one that it begins in.
        input_ids, labels: (length,).
        cut: whether something of it was left out: "" for no, else where it was cut, in words.
    """

    idx: int
    input_ids: list[int]
    labels: list[int]
    cut: str = ""


@dataclass(frozen=True)
class Language(Task):
    """Rows of tokens, compared by the perplexity of those that are learnt."""

    family = "generation"
    decoder_only = True
    main: ClassVar[str] = "perplexity"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy")
    answers: ClassVar[bool] = True
    """Whether the last tokens that a row learns are an answer to those before them."""

    @abstractmethod
    def rows(self, split: Split, processor: PreTrainedTokenizerBase, max_length: int) -> Iterable[Row]:
        """The rows of `split` of which something is learnt in `max_length` tokens."""

    def encode(self, split: Split, processor: PreTrainedTokenizerBase, max_length: int) -> "Dataset":
        """`split` as columns `input_ids`, `labels` (IGNORE where nothing is learnt), `length`, `idx` and `cut`.

        At most `max_length` tokens a row; `idx` is the row's place in the split, `cut` says where it was cut. Not
        padded, in memory only. InputError if nothing is left to learn.
        """
        datasets = need("datasets", "bench")
        pa = need("pyarrow", "bench")
        tables, rows = [], iter(self.rows(split, processor, max_length))
        while block := [*itertools.islice(rows, 10_000)]:  # since Python lists need ten times arrow's memory
            columns = {
                "input_ids": pa.array([row.input_ids for row in block], pa.list_(pa.int32())),
                "labels": pa.array([row.labels for row in block], pa.list_(pa.int32())),
                "length": pa.array([len(row.input_ids) for row in block], pa.int32()),
                "idx": pa.array([row.idx for row in block], pa.int64()),
                "cut": pa.array([row.cut for row in block], pa.string()),
            }
            tables.append(pa.table(columns))
        if not tables:
            raise InputError(
                f"max_length = {max_length}: no row of the split {split.name!r} has anything to learn within so many "
                "tokens: raise it"
            )
        return datasets.Dataset(pa.concat_tables(tables))

    def collate(
        self, model: nn.Module, processor: PreTrainedTokenizerBase, seed: int
    ) -> Callable[[list[dict[str, Any]]], Batch]:
        """From encoded rows to a batch padded on the right, with IGNORE as label and 0 in the mask of padding."""
        agree(self, model, processor)
        if (inner := inner_model(model)).config.is_encoder_decoder:
            raise InputError(f"{self.name} needs a decoder (Llama, Qwen, …), not {type(inner).__name__}")
        check_direction(model)

        def collate(rows: list[dict[str, Any]]) -> Batch:
            self.check(model, processor, rows, "a batch")
            return self._batch(rows, processor)

        return collate

    def check(self, model: nn.Module, processor: Any, examples: Any, name: str) -> None:
        check_rows(self, model, (row["input_ids"] for row in examples), processor, name)
        most, longest = context(model), max(row["length"] for row in examples)
        if most is not None and longest > most:
            raise InputError(f"a row of {name} has {longest} tokens, more than the {most} of the model")

    def evaluate(
        self,
        model: nn.Module,
        evaluation: Evaluation,
        processor: PreTrainedTokenizerBase,
        batch_size: int,
        final: bool,
    ) -> Scored:
        """Loss, perplexity and accuracy over all tokens that are learnt; if `final` also some answers."""
        split, examples = evaluation.split, evaluation.examples
        with evaluating(model):
            sums = self._sums(model, examples, processor, batch_size)
            samples = self._samples(model, examples, processor) if final else {}
        loss, right, tokens = sums.sum(axis=0)
        perplexity = METRICS["perplexity"].value
        assert perplexity is not None
        metrics = {
            "loss": loss / tokens,
            "perplexity": float(perplexity(sums[:, [0, 2]].sum(axis=0))),
            "token_accuracy": right / tokens,
        }
        metrics = {name + split.suffix: float(value) for name, value in metrics.items()}
        return Scored(metrics, _table(split, examples, sums, samples))

    def _batch(self, rows: Sequence[dict[str, Any]], processor: PreTrainedTokenizerBase) -> Batch:
        ids, mask = padded([row["input_ids"] for row in rows], pad_token(processor))
        labels, _ = padded([row["labels"] for row in rows], IGNORE)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _sums(self, model: nn.Module, examples: "Dataset", processor: PreTrainedTokenizerBase, size: int) -> np.ndarray:
        """(n, 3): of each row the loss of its tokens in nats, how many are predicted right, and how many there are."""
        device = next(model.parameters()).device
        sums = np.zeros((len(examples), 3))
        virtual = [each for each in model.modules() if isinstance(each, VirtualTokens) and each.generates]
        for rows in batches(examples["length"][:], size):
            batch = {
                name: values.to(device)
                for name, values in self._batch([examples[row] for row in rows], processor).items()
            }
            labels = batch.pop("labels")
            for each in virtual:
                each.labels = labels
            learnt = labels[:, 1:] != IGNORE
            logits = model(**batch).logits[:, :-1][learnt].float()  # (tokens, vocabulary)
            wanted = labels[:, 1:][learnt]
            losses = functional.cross_entropy(logits, wanted, reduction="none")
            found = torch.stack([losses, (logits.argmax(-1) == wanted).float(), torch.ones_like(losses)], 1)
            np.add.at(sums, np.asarray(rows)[learnt.nonzero()[:, 0].cpu()], found.double().cpu().numpy())
        if not math.isfinite(sums[:, 0].sum()):
            raise NotFiniteError("the loss is not finite: the training has diverged; try a lower learning rate")
        return sums

    def _samples(
        self, model: Any, examples: "Dataset", processor: PreTrainedTokenizerBase
    ) -> dict[int, tuple[str, str, str]]:
        """By place in `examples` the prompt, the model's most likely answer and the right one, for a few rows."""
        most = room(model)
        virtual = [each for each in model.modules() if isinstance(each, VirtualTokens)]
        places = dict.fromkeys(len(examples) * each // SAMPLES for each in range(SAMPLES if self.answers else 0))
        infix = any(each.infix for each in virtual)  # which is trained before the first answer of a row
        rows = {place: _answer(examples[place], infix) for place in places}
        rows = {place: row for place, row in rows.items() if most is None or len(row[0]) < most}
        if not rows:
            return {}
        ends = end_tokens(processor, [answer for _, answer in rows.values()])
        prompts = [prompt for prompt, _ in rows.values()]
        samples = {}
        written = continued(model, prompts, ends, LONGEST_SAMPLE, processor)
        for (place, (prompt, answer)), text in zip(rows.items(), written, strict=True):
            right = str(processor.decode(answer, skip_special_tokens=True)).strip()
            samples[place] = (str(processor.decode(prompt)).strip(), text, right)
        return samples


def end_tokens(processor: PreTrainedTokenizerBase, answers: Iterable[Sequence[int]]) -> list[int]:
    """What ends an answer: the end token, and the last special one of each of `answers`."""
    special = {*processor.all_special_ids, *processor.added_tokens_decoder}
    last = [next((id for id in reversed(answer) if id in special), None) for answer in answers]
    return sorted({processor.eos_token_id, *(id for id in last if id is not None)})


def room(model: nn.Module) -> int | None:
    """Tokens that `model` reads and writes in one row, without virtual ones; None for no limit."""
    most = context(model)
    virtual = sum(len(each) for each in model.modules() if isinstance(each, VirtualTokens))
    return None if most is None else most - virtual


def continued(
    model: nn.Module, prompts: Sequence[list[int]], ends: list[int], longest: int, processor: PreTrainedTokenizerBase
) -> list[str]:
    """What `model`, in evaluation mode, most likely writes after each prompt, up to one of `ends` or `longest` tokens.

    All prompts must be shorter than the `room`. The texts are without special tokens and white space around them.
    """
    most, inner = room(model), inner_model(model)
    left = [] if most is None else [most - max(map(len, prompts))]
    config = GenerationConfig(
        max_new_tokens=min([longest, *left]), do_sample=False, eos_token_id=ends, pad_token_id=pad_token(processor)
    )
    ids, mask = padded(prompts, pad_token(processor), left=True)
    device = next(model.parameters()).device
    with settings(inner, config):
        outputs = inner.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            custom_generate=decoding.search,
        )
    texts = []
    for output in outputs[:, ids.shape[1] :].tolist():
        written = [*itertools.takewhile(lambda id: id not in ends, output)]
        texts.append(str(processor.decode(written, skip_special_tokens=True)).strip())
    return texts


def _answer(row: dict[str, Any], first: bool) -> tuple[list[int], list[int]]:
    """The tokens of an encoded row's last answer, or of its first one, after those before it."""
    ids = row["input_ids"]
    learnt = [place for place, label in enumerate(row["labels"]) if label != IGNORE]
    answers = np.split(learnt, np.flatnonzero(np.diff(learnt) > 1) + 1)
    start, stop = answers[0 if first else -1][[0, -1]]
    return ids[:start], ids[start : stop + 1]


def _table(split: Split, examples: "Dataset", sums: np.ndarray, samples: dict[int, tuple[str, str, str]]) -> "pa.Table":
    """Loss and number of tokens of each row, and a prompt, an answer and the right one where there is a sample."""
    pa = need("pyarrow", "bench")
    count, idx = len(examples), split.data["idx"][:]
    shown = [samples.get(place, (None, None, None)) for place in range(count)]
    return pa.table(
        {
            "split": pa.array([split.name] * count, pa.string()),
            "idx": pa.array([idx[place] for place in examples["idx"][:]], pa.int64()),
            "label": pa.array([-1] * count, pa.int64()),
            "source": pa.array([prompt for prompt, _, _ in shown], pa.string()),
            "prediction": pa.array([written for _, written, _ in shown], pa.string()),
            "references": pa.array(
                [None if right is None else [right] for _, _, right in shown], pa.list_(pa.string())
            ),
            "statistics": pa.array(sums[:, [0, 2]].tolist(), pa.list_(pa.float64())),
        }
    )
