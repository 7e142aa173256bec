"""The family of tasks that give a text, or a pair of texts, a class or a value."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from rankwise.errors import InputError, nearest, need
from rankwise.metrics import METRICS, worth
from rankwise.metrics.metric import finite
from rankwise.runs.answers import LONGEST, WRONG, Answers, Wrong
from rankwise.tasks.agreement import agree, check_rows
from rankwise.tasks.base import Batch, Evaluation, Scored, Split, Task, evaluating
from rankwise.tasks.source import Rows, checked, own_split, read

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


@dataclass(frozen=True)
class Classification(Task):
    """One or two text columns and `label`: a class number, or a value where the task has no `labels` (a regression).

    Rows whose labels are all -1, or that have none, are unlabelled: they give predictions and no score.
    """

    family = "classification"

    @property
    def form(self) -> str:  # type: ignore[override]
        return "class" if self.labels else "value"

    def encode(self, split: Split, processor: PreTrainedTokenizerBase, max_length: int) -> "Dataset":
        """`split` as token numbers: what the tokenizer's model takes, `length` in tokens and, when labelled, `labels`.

        Cut to `max_length` tokens (of a pair the longer text first), not padded, in memory only.
        """
        datasets = need("datasets", "bench")
        pa = need("pyarrow", "bench")
        if max_length <= processor.num_special_tokens_to_add(pair=len(self.text) == 2):
            raise InputError(
                f"max_length={max_length} leaves no room for text: the tokenizer's special tokens take it all"
            )
        kinds = {
            "labels": pa.int64() if self.labels else pa.float32(),
            "length": pa.int32(),
            "attention_mask": pa.list_(pa.int8()),
        }
        labelled = split.labelled
        tables = []
        # In blocks: Python lists of token numbers take ten times the room of the arrow table that they end up in.
        for block in split.data.iter(batch_size=10_000):
            columns = dict(self._read(processor, [block[column] for column in self.text], max_length))
            columns["length"] = [len(ids) for ids in columns["input_ids"]]
            if labelled:
                columns["labels"] = block["label"]
            tables.append(
                pa.table(
                    {name: pa.array(values, kinds.get(name, pa.list_(pa.int32()))) for name, values in columns.items()}
                )
            )
        if not tables:
            raise InputError(f"split {split.name!r} of task {self.name!r} has no rows")
        return datasets.Dataset(pa.concat_tables(tables))

    def _read(self, processor: PreTrainedTokenizerBase, texts: list[list[str]], max_length: int) -> dict[str, Any]:
        """Texts as token numbers. Where a text spells the padding token, it is read as ordinary characters.

        Otherwise a classifier could take it for padding, and so for the end of the text.
        """
        read = dict(processor(*texts, truncation=True, max_length=max_length))
        pads = [processor.pad_token_id] if processor.pad_token_id is not None else processor.all_special_ids
        own = processor(*[""] * len(self.text))["input_ids"]
        spelt = [
            place for place, ids in enumerate(read["input_ids"]) if any(ids.count(pad) > own.count(pad) for pad in pads)
        ]
        for place in spelt:
            again = processor(
                *(column[place] for column in texts), truncation=True, max_length=max_length, split_special_tokens=True
            )
            for name, values in again.items():
                read[name][place] = values
        return read

    def collate(
        self, model: nn.Module, processor: PreTrainedTokenizerBase, seed: int
    ) -> Callable[[list[dict[str, Any]]], Batch]:
        agree(self, model, processor)
        pad = DataCollatorWithPadding(processor)

        def collate(rows: list[dict[str, Any]]) -> Batch:
            check_rows(self, model, [row["input_ids"] for row in rows], processor)
            return pad([{name: each for name, each in row.items() if name != "length"} for row in rows])

        return collate

    def check(self, model: nn.Module, processor: Any, examples: "Dataset", name: str) -> None:
        check_rows(self, model, (row["input_ids"] for row in examples), processor, name)

    def evaluate(
        self,
        model: nn.Module,
        evaluation: Evaluation,
        processor: PreTrainedTokenizerBase,
        batch_size: int,
        final: bool,
    ) -> Scored:
        outputs = logits(model, evaluation.examples, processor, batch_size)
        predicted = self.decode(outputs)
        rows = self._rows(evaluation, outputs, predicted)
        files = self.files(evaluation.split, predicted) if final else {}
        answers = self.answers(evaluation.split, outputs, predicted) if final else None
        return Scored(self.scores(evaluation.split, outputs, predicted), rows, files=files, answers=answers)

    def answer(
        self, model: nn.Module, questions: Sequence[Mapping[str, Any]], processor: Any, max_length: int, batch_size: int
    ) -> list[dict[str, Any]]:
        """The name of the most probable class and the probability of each, or the value of a regression."""
        pa = need("pyarrow", "bench")
        data = need("datasets", "bench").Dataset(pa.Table.from_pylist([*questions]))
        outputs = logits(model, self.encode(Split("", data, False), processor, max_length), processor, batch_size)
        predicted = self.decode(outputs)
        if not self.labels:
            return [{"prediction": float(str(np.float32(value)))} for value in predicted]
        shares = probabilities(outputs)
        return [
            {"prediction": self.labels[place], **dict(zip(self.added[1:], np.round(row, 6).tolist(), strict=True))}
            for place, row in zip(predicted, shares, strict=True)
        ]

    def own_rows(self, file: str) -> Split:
        pa, rows = need("pyarrow", "bench"), read(file, "")
        kinds = {column: pa.string() for column in self.text} | {"label": pa.string() if self.labels else pa.float32()}
        table = checked(rows, kinds, (*self.text, *(["label"] if self.labels else [])))
        if self.labels:
            table = table.set_column(table.column_names.index("label"), "label", self._numbers(rows, table["label"]))
        return own_split(rows, table)

    def _numbers(self, rows: Rows, names: "pa.ChunkedArray") -> "pa.Array":
        """The numbers of classes by their names. InputError for another name."""
        pa = need("pyarrow", "bench")
        number = {name: place for place, name in enumerate(self.labels)}
        found = names.to_pylist()
        strange = next((row for row, name in enumerate(found) if name not in number), None)
        if strange is not None:
            raise InputError(
                f"{rows.where}: the label {found[strange]!r} in {rows.at(strange)} is not among those of the "
                f"training rows{nearest(found[strange], number)}: {rows.remedy}"
            )
        return pa.array([number[name] for name in found], pa.int64())

    def answers(self, split: Split, outputs: np.ndarray, predicted: np.ndarray) -> Answers:
        """How often each class is predicted, from logits (n, outputs) and `predicted` (n,).

        Values of a regression that differ only by rounding are one answer.
        """
        labels = np.asarray(split.data["label"][:]) if split.labelled else None
        if not self.labels:
            middle = float(np.median(predicted))
            count = int(np.isclose(predicted, middle, rtol=1e-5, atol=1e-8).sum())
            same = 0 if labels is None else int(np.unique(labels, return_counts=True)[1].max())
            one = self.score(split, np.full_like(predicted, middle))
            return Answers(split.name, len(predicted), f"{middle:.4g}", count, majority_count=same, metrics=one)
        given = np.bincount(predicted, minlength=len(self.labels))
        commonest = self.labels[int(given.argmax())]
        found = Answers(split.name, len(predicted), commonest, int(given.max()), classes=self.labels)
        if labels is None:
            return found
        true = np.bincount(labels[labels >= 0], minlength=len(self.labels))
        # of classes that are as common, the one of the best score: F1 is that of one class alone
        most = np.flatnonzero(true == true.max())
        constant = {each: self.score(split, np.full_like(predicted, each)) for each in most[:10].tolist()}
        majority = max(constant, key=lambda each: worth(self.main, constant[each].get(self.main + split.suffix)))
        pairs, numbers = np.unique(np.stack([labels, predicted], axis=1), axis=0, return_counts=True)
        return replace(
            found,
            majority=self.labels[majority],
            majority_count=int(true[majority]),
            tied=[self.labels[each] for each in most if each != majority],
            metrics=constant[majority],
            confusion=[
                (int(label), int(guess), int(number))
                for (label, guess), number in zip(pairs, numbers, strict=True)
                if label >= 0
            ],
            wrong=self._wrong(split, outputs, predicted, labels),
        )

    def _wrong(self, split: Split, outputs: np.ndarray, predicted: np.ndarray, labels: np.ndarray) -> list[Wrong]:
        """The wrong answers with the greatest probability, in that order; equal ones in the order of the rows."""
        confidence = probabilities(outputs)[np.arange(len(predicted)), predicted]
        places = np.flatnonzero((predicted != labels) & (labels >= 0))
        places = places[np.argsort(-confidence[places], kind="stable")][:WRONG]
        return [
            Wrong(
                int(row["idx"]),
                [str(row[column])[:LONGEST] for column in self.text],
                int(labels[place]),
                int(predicted[place]),
                round(float(confidence[place]), 4),
            )
            for place, row in zip(places.tolist(), map(split.data.__getitem__, places.tolist()), strict=True)
        ]

    def files(self, split: Split, predicted: np.ndarray) -> dict[str, str | bytes]:
        """What to write beside the predictions (n,) of `split`; nothing unless a task has a use for it."""
        return {}

    def decode(self, logits: np.ndarray) -> np.ndarray:
        """Logits (n, classes) to class numbers (n,); (n, 1) or (n,) to values (n,) for a regression.

        ValueError for a logit that is not finite: argmax would turn it into a class without a word.
        """
        logits = finite(np.asarray(logits, dtype=np.float64).reshape(len(logits), -1))
        return logits.argmax(axis=1) if self.labels else logits[:, 0]

    def score(self, split: Split, predictions: np.ndarray, labels: np.ndarray | None = None) -> dict[str, float]:
        """The task's metrics of `predictions` (n,), class numbers or values; {} for a split without labels.

        `labels` (n,) are the split's own unless given. ValueError for a prediction that is not finite.
        """
        predictions = finite(predictions)
        if not split.labelled:
            return {}
        if labels is None:
            labels = np.asarray(split.data["label"][:])
        return {name + split.suffix: METRICS[name](predictions, labels) for name in self.metrics}

    def scores(self, split: Split, outputs: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        """Mean loss of logits (n, outputs) and the task's metrics; {} for a split without labels."""
        if not split.labelled:
            return {}
        given, labels = torch.from_numpy(outputs), torch.tensor(split.data["label"][:])
        loss = (
            functional.cross_entropy(given, labels) if self.labels else functional.mse_loss(given[:, 0], labels.float())
        )
        return {f"loss{split.suffix}": loss.item(), **self.score(split, predicted)}

    def _rows(self, evaluation: Evaluation, outputs: np.ndarray, predicted: np.ndarray) -> Any:
        pa = need("pyarrow", "bench")
        data, kind = evaluation.split.data, pa.int64() if self.labels else pa.float64()
        return pa.table(
            {
                "split": pa.array([evaluation.split.name] * len(data)),
                "idx": pa.array(data["idx"][:], pa.int64()),
                "label": pa.array(data["label"][:] if "label" in data.column_names else [-1] * len(data), kind),
                "prediction": pa.array(predicted.tolist(), kind),
                "logits": pa.array(outputs.tolist(), pa.list_(pa.float32())),
            }
        )


def probabilities(outputs: np.ndarray) -> np.ndarray:
    """Probabilities (n, classes) in double precision from logits (n, classes)."""
    logits = np.asarray(outputs, dtype=np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def logits(model: nn.Module, examples: "Dataset", tokenizer: PreTrainedTokenizerBase, batch_size: int) -> np.ndarray:
    """Logits (n, outputs) in fp32 in the order of `examples`, whose other columns than the model's inputs are ignored.

    Batches are made of rows of like length. No random number is drawn, and the model stays in the mode it was in.
    """
    # The longest first, so that a batch too large for the memory fails at once; equal lengths in their old order.
    order = np.argsort(-np.asarray(examples["length"][:]), kind="stable")
    inputs = examples.remove_columns([name for name in ("length", "labels") if name in examples.column_names])
    collate = DataCollatorWithPadding(tokenizer)
    device = next(model.parameters()).device
    found = []
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = inputs[order[start : start + batch_size].tolist()]
            batch = collate([dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)])
            outputs = model(**{name: values.to(device) for name, values in batch.items()})
            found.append(outputs.logits.float().cpu().numpy())
    result = np.empty((len(order), found[0].shape[1]), dtype=np.float32)
    result[order] = np.concatenate(found)
    return result
