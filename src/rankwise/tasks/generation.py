"""The family of tasks that turn a text into another text.

A task works with both kinds of models, depending on `is_encoder_decoder` in their configuration:

    encoder-decoder   the encoder reads the source; the decoder writes the target and an end token
    decoder           one row: source, end token, target, end token; the loss is over what follows the first end token

The released code of LoRA (Hu et al. 2021, arXiv 2106.09685) joins context and completion for GPT-2 in this way. In both
the loss is the mean over target tokens, including the end token, and the target is neither in the encoder's input nor
in the prompt for generation.
"""

import itertools
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
)

from rankwise.errors import InputError, NotFiniteError, need
from rankwise.ranks.sites import base_of
from rankwise.runs.answers import LONGEST, Answers
from rankwise.tasks import decoding
from rankwise.tasks.agreement import agree, check_rows, context
from rankwise.tasks.base import Batch, Evaluation, Scored, Split, Task, evaluating
from rankwise.tasks.source import checked, own_split, read

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

IGNORE = -100
"""The label of a token that the loss ignores."""


@dataclass(frozen=True)
class Judged:
    """The scores of all outputs for one split.

    Attributes:
        metrics: by name, without the split's suffix.
        scores: a value for each output, if the main metric is their mean.
        notes: for readers of the metrics, such as why one is missing.
        statistics: (n, k), numbers whose sums over the outputs give the main metric; see `Scored`.
    """

    metrics: dict[str, float]
    scores: Sequence[float] | None = None
    notes: tuple[str, ...] = field(default=())
    statistics: np.ndarray | None = None


@dataclass(frozen=True)
class Generation(Task):
    """Rows of `source`, `target` and `idx`; evaluation splits may have several `references` instead of a target.

    Attributes:
        prefix: text put before each source.
        target_length: longest target or output in tokens, including its end token; longer targets are truncated.
        beams: width of the beam search; 1 takes the most likely token at each step.
        length_penalty: p; a beam of n tokens has the score log-probability / n^p, so larger p gives longer outputs.
        no_repeat: n; no n tokens are repeated in an output. 0 allows it.
        split: the rows to score.
    """

    family = "generation"
    form = "target"
    text: ClassVar[tuple[str, ...]] = ("source",)
    target: ClassVar[str] = "target"

    prefix: str = ""
    target_length: Annotated[int, Field(ge=2)] = 64
    beams: Annotated[int, Field(ge=1)] = 4
    length_penalty: float = 1.0
    no_repeat: Annotated[int, Field(ge=0)] = 0
    split: Literal["validation", "test"] = "validation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.length_penalty):
            raise InputError(f"length_penalty must be a finite number, not {self.length_penalty}")

    def written(self) -> dict[str, int]:
        return {"end token": 1, "target_length": self.target_length}

    def apart(self) -> Split | None:
        """The validation rows, with `split: test`."""
        return replace(self, split="validation").evaluation()[0] if self.split == "test" else None

    @abstractmethod
    def score_texts(self, hypotheses: list[str], split: Split) -> Judged:
        """The metrics of one output for each row of `split`, in its order."""

    def encode(self, split: Split, processor: PreTrainedTokenizerBase, max_length: int) -> "Dataset":
        """`split` as token ids: `input_ids` of prefix and source, and `targets`, one or several for each row.

        Sources are truncated to `max_length` tokens, including special ones, and targets to `target_length`, including
        the end token. `length` is that of a source and its longest target. Not padded, in memory only.
        """
        datasets = need("datasets", "bench")
        pa = need("pyarrow", "bench")
        if max_length <= processor.num_special_tokens_to_add():
            raise InputError(
                f"max_length={max_length} leaves no room for text next to the tokenizer's special tokens: raise it"
            )
        end = _end(processor)
        tables = []
        for block in split.data.iter(batch_size=10_000):  # in blocks, since Python lists need ten times arrow's memory
            sources = [self.prefix + text for text in block["source"]]
            inputs = processor(sources, truncation=True, max_length=max_length)["input_ids"]
            groups = block["references"] if "references" in block else [[text] for text in block["target"]]
            flat = [text for group in groups for text in group]
            cut = processor(flat, add_special_tokens=False, truncation=True, max_length=self.target_length - 1)
            ended = iter([*ids, end] for ids in cut["input_ids"])
            targets = [[next(ended) for _ in group] for group in groups]
            length = [len(ids) + max(map(len, group)) for ids, group in zip(inputs, targets, strict=True)]
            columns = {
                "input_ids": pa.array(inputs, pa.list_(pa.int32())),
                "targets": pa.array(targets, pa.list_(pa.list_(pa.int32()))),
                "length": pa.array(length, pa.int32()),
            }
            tables.append(pa.table(columns))
        if not tables:
            raise InputError(f"split {split.name!r} of task {self.name!r} has no rows")
        return datasets.Dataset(pa.concat_tables(tables))

    def collate(
        self, model: nn.Module, processor: PreTrainedTokenizerBase, seed: int
    ) -> Callable[[list[dict[str, Any]]], Batch]:
        """From encoded rows to a batch with `labels`; InputError for a model that reads what it has to predict."""
        agree(self, model, processor)
        check_direction(model)
        most = context(model, decoder=_encodes(model))

        def collate(rows: list[dict[str, Any]]) -> Batch:
            check_rows(self, model, [row["input_ids"] + row["targets"][0] for row in rows], processor)
            batch = self._batch(model, processor, [(row["input_ids"], row["targets"][0]) for row in rows])
            _check_room(model, batch["labels"].shape[1], most)
            return batch

        return collate

    def check(self, model: nn.Module, processor: Any, examples: "Dataset", name: str) -> None:
        rows = ([*row["input_ids"], *itertools.chain(*row["targets"])] for row in examples)
        check_rows(self, model, rows, processor, name)

    def evaluate(
        self,
        model: nn.Module,
        evaluation: Evaluation,
        processor: PreTrainedTokenizerBase,
        batch_size: int,
        final: bool,
    ) -> Scored:
        """`loss` per target token, over all references; if `final` also the model's outputs and their metrics."""
        split, examples = evaluation.split, evaluation.examples
        self._check_outputs(model, examples)  # at the first evaluation, before a long training is lost
        with evaluating(model):
            metrics = {"loss": self._loss(model, examples, processor, batch_size)}
            hypotheses = self.generate(model, examples, processor, batch_size) if final else None
        judged = Judged({}) if hypotheses is None else self.score_texts(hypotheses, split)
        metrics |= judged.metrics
        return Scored(
            {name + split.suffix: value for name, value in metrics.items()},
            _table(split, hypotheses, judged),
            judged.notes,
            answers=None if hypotheses is None else _answers(split, hypotheses),
        )

    def generate(
        self, model: nn.Module, examples: "Dataset", processor: PreTrainedTokenizerBase, batch_size: int
    ) -> list[str]:
        """The output of `model`, in evaluation mode, for each of `examples` in their order, stripped of white space.

        The task's options apply, not the generation settings that came with the model.
        """
        self._check_outputs(model, examples)
        encodes, inner = _encodes(model), inner_model(model)
        end, pad = _end(processor), pad_token(processor)
        config = GenerationConfig(
            max_new_tokens=self.target_length,
            num_beams=self.beams,
            length_penalty=self.length_penalty if self.beams > 1 else None,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=pad,
            decoder_start_token_id=inner.config.decoder_start_token_id if encodes else None,
        )
        device = next(model.parameters()).device
        texts = [""] * len(examples)
        for rows in batches(examples["length"][:], batch_size):
            sources = examples[rows]["input_ids"]
            if not encodes:
                sources = [[*source, end] for source in sources]
            ids, mask = padded(sources, pad, left=not encodes)  # a decoder continues the end of the row
            start = 1 if encodes else ids.shape[1]
            rules = LogitsProcessorList([_NoRepeat(self.no_repeat, start)] if self.no_repeat else [])
            with settings(inner, config):
                outputs = inner.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=config,
                    logits_processor=rules,
                    custom_generate=decoding.search,
                )
            for row, output in zip(rows, outputs[:, start:].tolist(), strict=True):
                tokens = output[: output.index(end)] if end in output else output
                text = processor.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                texts[row] = str(text).strip()
        return texts

    def answer(
        self, model: nn.Module, questions: Sequence[Mapping[str, Any]], processor: Any, max_length: int, batch_size: int
    ) -> list[dict[str, Any]]:
        """What the model writes, without white space around it."""
        pa = need("pyarrow", "bench")
        data = need("datasets", "bench").Dataset(pa.Table.from_pylist([{**each, "target": ""} for each in questions]))
        examples = self.encode(Split("", data, False), processor, max_length)
        with evaluating(model):
            return [{"prediction": text} for text in self.generate(model, examples, processor, batch_size)]

    def own_rows(self, file: str) -> Split:
        rows = read(file, "")
        kinds = dict.fromkeys((*self.text, self.target), need("pyarrow", "bench").string())
        return own_split(rows, checked(rows, kinds, [*kinds]))

    def _check_outputs(self, model: nn.Module, examples: "Dataset") -> None:
        prompt = 0 if _encodes(model) else 1 + max(map(len, examples["input_ids"][:]))
        _check_room(model, prompt + self.target_length, context(model, decoder=_encodes(model)))

    def _loss(self, model: nn.Module, examples: "Dataset", processor: PreTrainedTokenizerBase, size: int) -> float:
        """Mean over all target tokens, independent of the batches."""
        pairs = [(row["input_ids"], target) for row in examples for target in row["targets"]]
        device = next(model.parameters()).device
        total = tokens = 0.0
        for rows in batches([len(source) + len(target) for source, target in pairs], size):
            batch = self._batch(model, processor, [pairs[row] for row in rows])
            loss = model(**{name: values.to(device) for name, values in batch.items()}).loss.item()
            if not math.isfinite(loss):
                raise NotFiniteError(f"the loss is {loss}: the training has diverged; try a lower learning rate")
            count = sum(len(pairs[row][1]) for row in rows)
            total, tokens = total + loss * count, tokens + count
        return total / tokens

    def _batch(
        self, model: nn.Module, processor: PreTrainedTokenizerBase, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> Batch:
        """Pairs of source and target as inputs of the model with labels, padded on the right."""
        pad = pad_token(processor)
        if _encodes(model):
            ids, mask = padded([source for source, _ in pairs], pad)
            labels, _ = padded([target for _, target in pairs], IGNORE)
        else:
            rows = [joined(source, target, _end(processor)) for source, target in pairs]
            ids, mask = padded([row for row, _ in rows], pad)
            labels, _ = padded([own for _, own in rows], IGNORE)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if _encodes(model):  # the model computes them from labels, which a Trainer with label smoothing does not pass
            batch["decoder_input_ids"] = inner_model(model).prepare_decoder_input_ids_from_labels(labels)
        return batch


def joined(source: list[int], target: list[int], end: int) -> tuple[list[int], list[int]]:
    """The row of a decoder for a source and its target, and the labels of that row."""
    prompt = [*source, end]
    return prompt + target, [IGNORE] * len(prompt) + target


class _NoRepeat(LogitsProcessor):
    """No n-gram twice in the output, though it may repeat some from the prompt, as in LoRA's released code."""

    def __init__(self, n: int, start: int):
        self.rule, self.start = NoRepeatNGramLogitsProcessor(n), start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.rule(input_ids[:, self.start :], scores)


@contextmanager
def settings(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Context with `config` as the model's own settings, which `generate` uses for what `config` does not set."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _encodes(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def inner_model(model: nn.Module) -> Any:
    """The transformers model, with the adapter's layers in it."""
    inner = base_of(model)
    if not hasattr(inner, "generate"):
        raise InputError(f"{type(inner).__name__} cannot write text: give a model that was trained to generate")
    return inner


def _end(processor: PreTrainedTokenizerBase) -> int:
    if not isinstance(processor.eos_token_id, int):
        raise InputError("the model's tokenizer has no end token (eos_token) to end a text with: use another model")
    return processor.eos_token_id


def pad_token(processor: PreTrainedTokenizerBase) -> int:
    return processor.pad_token_id if isinstance(processor.pad_token_id, int) else _end(processor)


def padded(rows: Sequence[list[int]], value: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows padded to one length, and a mask with 0 for padding."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), value), torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        columns = slice(width - len(row), None) if left else slice(len(row))
        ids[index, columns], mask[index, columns] = torch.tensor(row), 1
    return ids, mask


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in groups of similar length, the longest first, so that a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + size] for start in range(0, len(order), size)]


def _check_room(model: nn.Module, width: int, most: int | None) -> None:
    """InputError for rows that are longer than the `most` tokens that the model's decoder can read."""
    if most is not None and width > most:
        what = "target_length is" if _encodes(model) else "source and target_length together are"
        raise InputError(f"{what} {width} tokens, more than the {most} of the model: lower max_length or target_length")


def check_direction(model: nn.Module) -> None:
    """InputError for a model without encoder whose output depends on later tokens: it would read the target."""
    if _encodes(model):
        return
    config: Any = model.config
    device = next(model.parameters()).device
    with evaluating(model):
        last = config.get_text_config().vocab_size - 1
        first = model(input_ids=torch.tensor([[0, 0], [0, last]], device=device)).logits[:, 0]
    if not torch.allclose(first[0], first[1], rtol=1e-3, atol=1e-3):
        raise InputError(
            f"{type(inner_model(model)).__name__} reads the tokens after the one that it predicts, so it cannot write "
            "text: use a decoder (GPT-2, Llama, …) or an encoder-decoder (T5, …)"
        )


def _answers(split: Split, hypotheses: list[str]) -> Answers:
    """The most frequent output and label: the labels are the targets, or the first of each row's references."""
    output, count = Counter(hypotheses).most_common(1)[0]
    targets = split.data["references"][:] if "references" in split.data.column_names else split.data["target"][:]
    labels = Counter(text if isinstance(text, str) else text[0] for text in targets)
    return Answers(split.name, len(hypotheses), output[:LONGEST], count, majority_count=labels.most_common(1)[0][1])


def _table(split: Split, hypotheses: list[str] | None, judged: Judged) -> "pa.Table":
    """The output for each row, no rows without outputs; `label` is -1, since there are no classes."""
    pa = need("pyarrow", "bench")
    data = split.data if hypotheses is not None else split.data.select([])
    references = data["references"][:] if "references" in data.column_names else [[text] for text in data["target"][:]]
    columns = {
        "split": pa.array([split.name] * len(data), pa.string()),
        "idx": pa.array(data["idx"][:], pa.int64()),
        "label": pa.array([-1] * len(data), pa.int64()),
        "source": pa.array(data["source"][:], pa.string()),
        "prediction": pa.array(hypotheses or [], pa.string()),
        "references": pa.array(references, pa.list_(pa.string())),
    }
    if judged.scores is not None:
        columns["score"] = pa.array([float(score) for score in judged.scores], pa.float64())
    if judged.statistics is not None:
        columns["statistics"] = pa.array(judged.statistics.tolist())
    return pa.table(columns)
