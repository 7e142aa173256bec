"""The loss in chunks of tokens is the model's own: loss and gradients, whatever is done with the logits before it."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LabelSmoother

import models
import rankwise as rw
from asserts import refused
from rankwise.errors import InputError
from rankwise.nets import chunked_loss
from rankwise.nets.chunked_loss import Chunked, Smoothed, output_layer, put_on, untried

WRITES = {
    "llama": {},
    "gpt2": {},
    "opt": {},
    "falcon": {},
    "bloom": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
}
BOTH: dict[str, Any] = {"t5": {}, "bart": {}, "marian": {}}
KINDS = [*WRITES, *BOTH]


def model(kind: str, **more: Any) -> nn.Module:
    """A small model of a family; one that scales or caps its logits does."""
    auto = AutoModelForCausalLM if kind in WRITES else AutoModelForSeq2SeqLM
    own = {**WRITES, **BOTH}[kind]
    [(_, made)] = models.every_model(auto, [kind], pad_token_id=0, decoder_start_token_id=0, **own, **more)
    return made


def batch(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Rows with padding, and with tokens that have no label."""
    draw = torch.Generator().manual_seed(rows)
    ids = torch.randint(2, models.VOCABULARY, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = ids.masked_fill((mask == 0) | (torch.rand(ids.shape, generator=draw) < 0.3), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def learnt(made: nn.Module, **inputs: Any) -> tuple[float, dict[str, Tensor]]:
    made.zero_grad()
    loss = made(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def assert_equal(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5) and one[1].keys() == other[1].keys()
    most = max(float(gradient.abs().max()) for gradient in other[1].values())
    for name, gradient in other[1].items():
        assert torch.allclose(one[1][name], gradient, rtol=1e-4, atol=1e-5 * most), name


def put_on_small(made: nn.Module, tokens: int = 4) -> Chunked:
    put_on(made)
    chunked = untried(made)
    chunked.tokens = tokens
    chunked.losses = 0
    return chunked


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_models_own(kind: str) -> None:
    """Those of the head, too, which may be the embedding. With a count of items the loss is their sum over it."""
    made = model(kind)
    counts: dict[str, Any] = {"num_items_in_batch": torch.tensor(5)} if kind in WRITES else {}
    expected = [learnt(made, **batch(), **more) for more in ({}, counts)]
    chunked = put_on_small(made)
    for more, known in zip(({}, counts), expected, strict=True):
        assert_equal(learnt(made, **batch(), **more), known)
    assert (chunked.losses, chunked.whole_logits) == (2, 0)


@pytest.mark.large
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSeq2SeqLM])
def test_every_family_is_the_same_or_refused(auto: Any) -> None:
    """Refused are those whose loss is made from log-probabilities of their own."""
    kinds = models.WRITERS if auto is AutoModelForCausalLM else models.TRANSLATORS
    refusals, tried = [], 0
    for kind, made in models.every_model(auto, kinds, pad_token_id=0, decoder_start_token_id=0):
        try:
            expected = learnt(made, **chunked_loss._tiny(made))
        except Exception:  # it needs more than tokens
            continue
        tried += 1
        try:
            put_on_small(made)
        except InputError:
            refusals.append(kind)
            continue
        assert_equal(learnt(made, **chunked_loss._tiny(made)), expected)
    assert tried > 15 and "prophetnet" in refusals and len(refusals) < 0.1 * tried, refusals


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.sampled_from(["mean", "sum"]), st.sampled_from([0.0, 0.1]))
def test_the_size_of_a_chunk_changes_nothing(tokens: int, rows: int, reduction: str, smoothing: float) -> None:
    """In others' chunked losses, the means of chunks were added up: right on short rows, 128 times the loss on long."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(5, 11, bias=False).double(), torch.randn(2 * rows, 5).double().requires_grad_()
    labels = torch.randint(0, 11, (2 * rows,))
    labels[::3] = -100
    options = {"reduction": reduction, "label_smoothing": smoothing}

    def gradients(logits: Tensor) -> list[Tensor]:
        loss = 3 * functional.cross_entropy(logits, labels, **options)  # what comes after counts, too
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, head.weight])]

    for one, other in zip(gradients(Chunked(head.forward, tokens)(hidden)), gradients(head(hidden)), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14, equal_nan=True)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    head, labels = nn.Linear(3, 5).double(), torch.tensor([1, -100, 4, 0])
    chunked = Chunked(head.forward, tokens=3)
    assert torch.autograd.gradcheck(
        lambda hidden, *_: functional.cross_entropy(2 * torch.tanh(chunked(hidden)), labels),
        (torch.randn(4, 3, dtype=torch.double, requires_grad=True), head.weight, head.bias),
    )


def test_a_number_of_labels_that_is_not_that_of_tokens_is_refused_as_by_torch() -> None:
    head = nn.Linear(3, 5)
    logits = Chunked(head.forward, tokens=2)(torch.randn(4, 3))
    with pytest.raises(ValueError, match="to match target batch_size"):
        functional.cross_entropy(logits, torch.zeros(7, dtype=torch.long))


class Routed(nn.Module):
    """A head with a weight that only tokens with a positive first feature use."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.some = nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.all(hidden)
        return logits if len(hidden) and not (hidden[:, 0] > 0).any() else logits + self.some(hidden)


def test_a_weight_that_only_some_chunks_use_keeps_its_gradient() -> None:
    torch.manual_seed(0)
    head, labels = Routed(), torch.tensor([1, 0, 4, 2])
    hidden = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, 1.0], [-1.0, 1.0, 2.0], [-2.0, 1.0, 0.0]])
    chunked = Chunked(head.forward, tokens=2)(hidden)
    found = torch.autograd.grad(functional.cross_entropy(chunked, labels), head.some.weight)
    first = functional.cross_entropy(head(hidden[:2]), labels[:2], reduction="sum") / 4
    torch.testing.assert_close(found, torch.autograd.grad(first, head.some.weight))


def test_rows_without_any_label_have_the_loss_that_they_have_without_chunks() -> None:
    """0 as a sum; the mean over none is no number."""
    made = model("llama")
    nothing = {**batch(), "labels": torch.full((3, 7), -100)}
    put_on_small(made)
    assert made(**nothing).loss.isnan() and made(**nothing, num_items_in_batch=torch.tensor(4)).loss == 0


@pytest.mark.parametrize(
    "method",
    [rw.LoRA(rank=2, targets=["q_proj", "lm_head"]), rw.SimplexLoRA(rank=2, targets=["q_proj", "lm_head"])],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_an_adapter_of_the_head_learns(method: rw.methods.Method, fast: bool) -> None:
    """And its ω, which is not in the head. Others' fused losses read the head's weight, and its adapter never moved."""
    made = models.stirred(method.attach(model("llama", tie_word_embeddings=False))).eval()
    expected = learnt(made, **batch())
    assert any("lm_head" in name for name in expected[1])
    if fast:
        rw.fast(made)
    chunked = put_on_small(made)
    assert_equal(learnt(made, **batch()), expected)
    assert (chunked.losses, chunked.whole_logits) == (1, 0)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor, and the names of what ran."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.names = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func._schema.name)
        tensors = (each for each in tree_leaves(result) if isinstance(each, Tensor) and not each.is_meta)
        self.most = max([self.most, *(each.numel() for each in tensors)])
        return result


def wide(**more: Any) -> nn.Module:
    """A model whose weights and activations are all smaller than its logits."""
    config = LlamaConfig(
        vocab_size=600, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, **more
    )
    return LlamaForCausalLM(config)


def test_no_tensor_has_all_logits_and_nothing_waits_for_the_device() -> None:
    made, ids = rw.LoRA(rank=2).attach(wide()), torch.arange(64).reshape(2, 32)
    tokens_by_words = 64 * 600
    with Largest() as plain:
        made(input_ids=ids, labels=ids).loss.backward()
    put_on_small(made, tokens=8)
    kept: list[int] = []

    def keep(each: Tensor) -> Tensor:
        kept.append(each.numel())
        return each

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each), Largest() as lean:
        made(input_ids=ids, labels=ids).loss.backward()
    assert plain.most >= tokens_by_words
    assert lean.most <= 600 * 16 and max(kept) <= 600 * 16  # the embedding
    assert not lean.names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::is_nonzero"}


def test_whoever_needs_all_logits_has_them_and_their_gradients() -> None:
    made, inputs = model("gemma2"), batch()
    own = made(**inputs).logits
    expected = torch.autograd.grad(own.square().mean(), [*made.parameters()], allow_unused=True)
    put_on_small(made)
    logits = made(**inputs).logits
    assert type(logits) is not Tensor and logits.shape == own.shape and logits.dtype == own.dtype
    assert torch.equal(logits.argmax(-1), own.argmax(-1)) and torch.equal(logits[:, -1], own[:, -1])
    assert torch.equal(functional.log_softmax(logits, -1), functional.log_softmax(own, -1))
    assert torch.equal(torch.stack([logits, logits])[0], own) and len([*logits]) == 3
    found = torch.autograd.grad(made(**inputs).logits.square().mean(), [*made.parameters()], allow_unused=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(made(**inputs).logits[0, 0, 3, ...], own[0, 0, 3, ...])
    logits = made(**inputs).logits
    with torch.no_grad():
        assert not logits.logsumexp(-1).requires_grad
    assert logits.logsumexp(-1).requires_grad
    logits = made(**inputs).logits
    logits.mul_(2)
    assert torch.equal(logits.clone(), 2 * own)
    with torch.no_grad():
        assert type(made(**inputs).logits) is Tensor


def written(*steps: Any) -> Any:
    """Logits (…, words) and a part of them, after each of `steps` on both."""

    def write(logits: Tensor) -> tuple[Tensor, Tensor]:
        part = logits[:, :-1]
        for step in steps:
            result = step(logits, part)
            logits, part = (logits, part) if result is None else result
        return logits[:, :-1], part

    return write


def done(_: Tensor) -> None:
    """What has changed its argument."""


def assign(tensor: Tensor) -> None:
    tensor[..., :3] = -1e4


def scale(tensor: Tensor) -> None:
    tensor /= 0.1


WRITTEN = {
    "a part": written(lambda logits, part: assign(part)),
    "the whole": written(lambda logits, part: scale(logits)),
    "one after the other": written(lambda logits, part: assign(logits), lambda logits, part: scale(part)),
    "a part of a part": written(lambda logits, part: assign(part[1:])),
    "as rows": written(lambda logits, part: assign(logits.view(-1, logits.shape[-1])[2:])),
    "as rows, copied": written(lambda logits, part: assign(part.reshape(-1, part.shape[-1]))),
    "what was contiguous": written(lambda logits, part: assign(logits.contiguous())),
    "what is made contiguous": written(lambda logits, part: assign(part.contiguous())),
    "with a method": written(lambda logits, part: done(part.masked_fill_(part > 0.5, -5.0))),
    "with a function": written(lambda logits, part: done(functional.relu(part, inplace=True))),
    "the same in fp32": written(lambda logits, part: assign(logits.float())),
    "a copy": written(lambda logits, part: assign(logits * 2)),
    "copies": written(lambda logits, part: (logits * 2, part * 2), lambda logits, part: assign(part)),
    "what it was copied from": written(lambda logits, part: (assign(logits), logits, part.contiguous())[1:]),
    "before it is copied": written(lambda logits, part: (logits, (part.contiguous(), assign(logits))[0])),
    "through detached": written(lambda logits, part: assign(part.detach())),
}


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN.keys())
@pytest.mark.parametrize("which", [0, 1], ids=["whole", "part"])
def test_what_is_written_into_logits_or_a_part_of_them_is_seen_where_torch_shows_it(write: Any, which: int) -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(5, 11), torch.randn(2, 6, 5).requires_grad_()
    labels = torch.randint(0, 11, (10,))

    def gradients(forward: Any) -> list[Tensor]:
        logits = write(forward(hidden))[which]
        loss = functional.cross_entropy(logits.reshape(-1, 11), labels)
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, head.weight])]

    with torch.no_grad():
        plain = write(head(hidden))
    for one, other in zip(gradients(Chunked(head.forward, tokens=4)), gradients(head), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(write(Chunked(head.forward)(hidden)), plain, strict=True):
        torch.testing.assert_close(one + 0, other)


def test_a_number_that_logits_were_scaled_by_may_change_before_the_loss() -> None:
    head, hidden, by = nn.Linear(3, 5), torch.randn(4, 3), torch.tensor(2.0)
    logits = Chunked(head.forward)(hidden) * by
    by.fill_(7.0)
    labels = torch.tensor([1, 0, 4, 2])
    expected = functional.cross_entropy(2 * head(hidden), labels)
    torch.testing.assert_close(functional.cross_entropy(logits, labels), expected)


def test_a_hook_on_logits_sees_their_gradient_or_is_refused() -> None:
    made, inputs = model("llama"), batch()
    put_on_small(made)
    labels, seen = inputs.pop("labels"), list[Tensor]()
    logits = made(**inputs).logits
    logits.register_hook(seen.append)
    functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)).backward()
    assert [gradient.shape for gradient in seen] == [logits.shape]
    logits = made(**inputs, labels=labels).logits
    for ask in (logits.retain_grad, lambda: logits.register_hook(seen.append)):
        assert re.search(
            r"have no gradient for (retain_grad|register_hook): call lean\(model, on=False\)", refused(ask)
        )


def test_a_hook_on_a_weight_of_the_head_is_called_once() -> None:
    made = model("llama", tie_word_embeddings=False)
    chunked = put_on_small(made)
    hook = made.lm_head.weight.register_hook(lambda gradient: gradient / 2)
    found = learnt(made, **batch())
    assert chunked.losses == 0
    chunked_loss.take_off(made)
    assert_equal(found, learnt(made, **batch()))
    assert "(a weight of its head has a hook)" in refused(lambda: put_on_small(made))
    hook.remove()
    put_on_small(made)


def test_second_derivatives_are_refused() -> None:
    made = model("llama")
    put_on_small(made)
    inputs = batch()
    with pytest.raises(InputError, match="no second derivatives"):
        torch.autograd.grad(made(**inputs).loss, [*made.parameters()][:1], create_graph=True)


def test_a_head_in_bf16_adds_up_many_chunks_without_losing_the_last() -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 32, bias=False), torch.randn(16_384, 8) + 1
    labels = torch.randint(0, 32, (16_384,))
    [exact] = torch.autograd.grad(functional.cross_entropy(head(hidden), labels), head.weight)
    head, hidden = head.bfloat16(), hidden.bfloat16()
    loss = functional.cross_entropy(Chunked(head.forward, tokens=16)(hidden), labels)
    [found] = torch.autograd.grad(loss, head.weight)
    assert found.dtype == torch.bfloat16 and (found.float() - exact).norm() < 0.02 * exact.norm()


def test_within_checkpointing_of_the_whole_model_it_learns_the_same() -> None:
    made, inputs = model("llama"), batch()
    expected = learnt(made, **inputs)
    chunked = put_on_small(made)

    made.zero_grad()
    loss = checkpoint(lambda: made(**inputs).loss, use_reentrant=False)
    loss.backward()
    gradients = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    assert_equal((loss.item(), gradients), expected)
    assert chunked.losses == 2 and chunked.whole_logits == 0


def test_what_escapes_torch_functions_is_an_error_and_no_lost_gradient() -> None:
    made = model("llama")
    put_on_small(made)

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.ops.aten.mul(x, 2)

    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="logits that are not computed"):
        Double.apply(made(**batch()).logits)


class Own(LlamaForCausalLM):
    """A loss of its own, of which cross-entropy is a part."""

    def forward(self, **inputs: Any) -> Any:
        outputs = super().forward(**inputs)
        outputs.loss = outputs.loss + 1e-4 * outputs.logits.logsumexp(-1).square().mean()
        return outputs


class Elsewhere(LlamaForCausalLM):
    """A head that is not asked."""

    def get_output_embeddings(self) -> nn.Module:
        return self.model.layers[0].mlp.down_proj


class Without(LlamaForCausalLM):
    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.parametrize("kind", [Own, Elsewhere, Without])
def test_another_loss_is_refused_and_the_model_stays_as_it_was(kind: type[LlamaForCausalLM]) -> None:
    made = kind(wide().config)
    expected = learnt(made, **batch())
    line = refused(lambda: put_on(made))
    assert line == f"activation_memory: the loss of {kind.__name__} cannot be computed in chunks: leave it out"
    found = learnt(made, **batch())
    assert found[0] == expected[0] and all(torch.equal(found[1][name], each) for name, each in expected[1].items())


def test_a_copy_of_the_model_has_a_head_of_its_own() -> None:
    made = model("llama", tie_word_embeddings=False)
    put_on_small(made)
    other = copy.deepcopy(made)
    nn.init.zeros_(output_layer(other).weight)
    assert other(**batch()).loss.item() == pytest.approx(torch.tensor(models.VOCABULARY).log().item())
    assert made(**batch()).loss > other(**batch()).loss


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("items", [None, 5, torch.tensor(5)])
def test_smoothed_labels_are_those_of_transformers(shift: bool, items: Any) -> None:
    made, inputs = model("llama"), batch()
    labels = inputs.pop("labels")

    def gradients(smoother: Any) -> list[Tensor]:
        loss = smoother(made(**inputs), labels, shift_labels=shift, num_items_in_batch=items)
        return [loss.detach(), *torch.autograd.grad(loss, [*made.parameters()])]

    expected = gradients(LabelSmoother(epsilon=0.2))
    chunked = put_on_small(made)
    for one, other in zip(gradients(Smoothed(0.2)), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    assert (chunked.losses, chunked.whole_logits) == (1, 0)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_under_autocast_the_head_computes_as_the_model_does(kind: str, smoothed: bool) -> None:
    """Also where a Trainer computes the loss, outside of the model's autocast."""
    made, inputs = model(kind), batch()
    labels = inputs["labels"]
    if smoothed:
        del inputs["labels"]
        inputs.update({"decoder_input_ids": labels.clamp(min=0)} if kind == "t5" else {})

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = made(**inputs)
        return Smoothed(0.1)(outputs, labels) if smoothed else outputs.loss

    def gradients() -> list[Tensor]:
        value = loss()
        return [value.detach(), *torch.autograd.grad(value, [*made.parameters()])]

    expected = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        chunked = put_on_small(made)
    found = gradients()
    assert (chunked.losses, chunked.whole_logits) == (1, 0)
    assert found[0].dtype == expected[0].dtype and torch.allclose(found[0], expected[0], rtol=1e-2)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert (one - other).norm() <= 0.02 * other.norm() + 1e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulated_batches_weigh_each_token_the_same(smoothing: float, tmp_path: Path) -> None:
    """transformers once averaged the means of batches, which have different numbers of tokens."""
    rows = [{name: value[0] for name, value in batch(1 + row, 7).items()} for row in range(4)]
    for row, number in zip(rows, (6, 1, 3, 5), strict=True):
        row["labels"][number:] = -100
        row["labels"][1] = 9

    def gradients(at_once: int, lean: bool) -> dict[str, Tensor]:
        method = rw.LoRA(rank=2, dropout=0.0)
        torch.manual_seed(0)
        made = models.stirred(method.attach(model("llama")))
        if lean:
            put_on_small(made)
        folder = tmp_path / f"{at_once}-{lean}"
        args = TrainingArguments(
            str(folder),
            max_steps=1,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=4 // at_once,
            label_smoothing_factor=smoothing,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            max_grad_norm=0,
        )
        trainer = rw.RankTrainer(model=made, args=args, train_dataset=rows, method=method)
        if lean and smoothing:
            trainer.label_smoother = Smoothed(smoothing)
        found: dict[str, Tensor] = {}

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                found.update({name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None})

        trainer.add_callback(Look())
        trainer.train()
        return found

    expected = gradients(4, lean=False)
    for at_once in (4, 1):
        found = gradients(at_once, lean=True)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name
