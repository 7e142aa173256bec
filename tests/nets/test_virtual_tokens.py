"""Virtual tokens: where they stand, that a forward is what it is by hand, and that callers see nothing of them."""

import copy

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import models
import rankwise as rw
from rankwise.nets.virtual_tokens import Layout, add_virtual_tokens

PREFIX, INFIX = 3, 2
LENGTHS = (7, 4, 6, 1)
LAYERS = 3

both = pytest.mark.parametrize("layers", [False, True], ids=["first", "every"])


def config(shape, **options):
    common = {"vocab_size": 64, "num_labels": 3, **options}
    return {
        "bert": lambda: transformers.BertConfig(
            **common, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=32,
            pad_token_id=0, max_position_embeddings=32,
        ),
        "roberta": lambda: transformers.RobertaConfig(
            **common, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=32,
            pad_token_id=0, max_position_embeddings=33,
        ),
        "deberta-v2": lambda: transformers.DebertaV2Config(
            **common, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=32,
            relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], position_biased_input=False,
            pooler_hidden_size=16, max_position_embeddings=32,
        ),
        "gpt2": lambda: transformers.GPT2Config(
            **common, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=32, pad_token_id=0, bos_token_id=2,
            eos_token_id=1,
        ),
        "llama": lambda: transformers.LlamaConfig(
            **common, hidden_size=16, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
            num_key_value_heads=1, pad_token_id=0, bos_token_id=2, eos_token_id=1, max_position_embeddings=32,
        ),
        "t5": lambda: transformers.T5Config(
            **common, d_model=16, d_kv=8, d_ff=32, num_layers=LAYERS, num_heads=2, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0, dropout_rate=0.0,
        ),
    }[shape]()  # fmt: skip


def base(shape, kind="SequenceClassification", **options):
    """A model with random weights large enough that every position matters."""
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config(shape, **options)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "norm" not in name.lower():
                p.mul_(1.0 if shape == "t5" else 8.0)
    return model


def attached(model, layers, prefix=PREFIX, infix=INFIX):
    """A copy of `model` with virtual tokens."""
    model = copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(1)
    tokens = add_virtual_tokens(model, prefix, infix, layers)
    with torch.no_grad():
        for p in tokens.parameters():
            p.normal_(std=1.0)
    return model


def words(length, seed=0):
    ids = torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(100 * length + seed))
    ids[:, -1] = 1 if length > 1 else ids[:, -1]
    return ids


def padded(rows, side, pad):
    """One batch of `rows`, each (1, length): ids and mask."""
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        columns = slice(0, row.shape[1]) if side == "right" else slice(width - row.shape[1], width)
        ids[place, columns], mask[place, columns] = row[0], 1
    return {"input_ids": ids, "attention_mask": mask}


def reader_of(model):
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


def blocks_of(model):
    reader = reader_of(model)
    for path in ("block", "h", "layers", "encoder.layer"):
        try:
            return reader.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(path)


def by_hand(plain, virtual, ids, cut, start=0):
    """Embeddings of one unpadded row with the virtual ones spliced in, and hooks on `plain` for the later inputs.

    The prefix comes at column `start`, the infix before the caller's column `cut`.
    """
    tokens = virtual.virtual_tokens
    embedded = reader_of(plain).get_input_embeddings()(ids)
    prefix, infix = tokens.embeddings.detach()[None].split([tokens.prefix, tokens.infix], dim=1)
    spliced = torch.cat([embedded[:, :start], prefix, embedded[:, start:cut], infix, embedded[:, cut:]], 1)

    def replace(rows):
        def hook(block, args):
            hidden = args[0].clone()
            hidden[:, start : start + tokens.prefix] = rows[: tokens.prefix]
            behind = cut + tokens.prefix
            hidden[:, behind : behind + tokens.infix] = rows[tokens.prefix :]
            return hidden, *args[1:]

        return hook

    handles = []
    if tokens.layers is not None:
        for block, rows in zip(list(blocks_of(plain))[1:], tokens.layers.detach(), strict=True):
            handles.append(block.register_forward_pre_hook(replace(rows)))
    return spliced, handles


# Where they stand


@st.composite
def layouts(draw):
    width = draw(st.integers(1, 8))
    rows = draw(st.lists(st.tuples(st.integers(1, width), st.sampled_from(["left", "right"])), min_size=1, max_size=4))
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for place, (length, side) in enumerate(rows):
        real[place, slice(0, length) if side == "right" else slice(width - length, width)] = True
    options = {"causal": draw(st.booleans()), "after_first": draw(st.booleans())}
    prompt = None
    if draw(st.booleans()):  # the column of the first label, the width for rows without any
        prompt = torch.tensor([draw(st.integers(0, width)) for _ in rows])
    return real, draw(st.integers(0, 4)), draw(st.integers(0, 4)), prompt, options


@given(layouts())
def test_every_row_keeps_its_tokens_and_the_virtual_ones_stand_where_they_belong(drawn):
    real, prefix, infix, prompt, options = drawn
    layout = Layout.of(real, prefix, infix, prompt=prompt, **options)
    width = real.shape[1]
    for row in range(len(real)):
        columns = real[row].nonzero().flatten().tolist()
        first, end = columns[0], columns[-1] + 1
        start = first + options["after_first"]
        if prompt is not None and prompt[row] < width:
            end = int(prompt[row])
        end = max(start, end)
        tokens = [*range(start), *["p"] * prefix, *range(start, end), *["i"] * infix, *range(end, width)]

        assert len(layout.copies[row]) == len(tokens)
        own = [(column, copied) for column, copied in zip(tokens, layout.copies[row].tolist(), strict=True)]
        assert all(column == copied for column, copied in own if column not in ("p", "i"))
        assert all(copied == first for column, copied in own if column == "p")
        assert all(copied == max(first, end - 1) for column, copied in own if column == "i")
        assert [tokens[column] for column in layout.virtual[row]] == ["p"] * prefix + ["i"] * infix
        if options["causal"]:  # the last column before the caller's next one
            ends = [tokens.index(column + 1) - 1 for column in range(width - 1)] + [len(tokens) - 1]
            assert layout.read[row].tolist() == ends
        else:
            assert layout.read[row].tolist() == [tokens.index(column) for column in range(width)]


@given(layouts())
def test_masks_and_positions_count_virtual_tokens_as_tokens(drawn):
    real, prefix, infix, prompt, options = drawn
    layout = Layout.of(real, prefix, infix, prompt=None, **options)
    mask = layout.insert(real.long())
    assert mask.gather(1, layout.virtual).all() and torch.equal(mask.sum(1), real.sum(1) + prefix + infix)
    counted = (real.long().cumsum(1) - 1).clamp(min=0)
    kept = mask.bool()
    assert torch.equal(layout.positions(counted)[kept], (mask.cumsum(1) - 1)[kept])


@given(layouts())
def test_what_is_put_and_cut_again_leaves_the_callers_columns(drawn):
    real, prefix, infix, prompt, options = drawn
    layout = Layout.of(real, prefix, infix, prompt=prompt, **{**options, "causal": False})
    values = torch.arange(real.numel()).view(*real.shape, 1).float()
    longer = values.gather(1, layout.copies[..., None])
    learnt = -torch.arange(1.0, prefix + infix + 1)[:, None]
    put = layout.put(longer, learnt)
    assert torch.equal(layout.cut(put), values)
    assert torch.equal(put.gather(1, layout.virtual[..., None]), learnt.expand(len(real), -1, -1))
    assert layout.cut((put, None))[1] is None and layout.cut(values) is values or prefix + infix == 0


# What a forward computes


@both
@pytest.mark.parametrize("shape", ["bert", "roberta", "deberta-v2", "gpt2", "llama"])
@pytest.mark.parametrize("prefix, infix", [(PREFIX, INFIX), (PREFIX, 0), (0, INFIX)])
@torch.no_grad()
def test_a_classifier_computes_what_it_computes_by_hand(shape, layers, prefix, infix):
    plain = base(shape)
    model, ids = attached(plain, layers, prefix, infix), words(6)
    decoder = shape in ("gpt2", "llama")
    spliced, handles = by_hand(plain, model, ids, cut=6, start=0 if decoder else 1)
    # Of embeddings alone a decoder reads the last column, which is the infix's where there is one.
    want = plain(inputs_embeds=spliced).logits
    assert len(handles) == (LAYERS - 1 if layers else 0)
    for handle in handles:
        handle.remove()
    assert torch.allclose(model(ids).logits, want, atol=1e-5)
    assert not torch.allclose(plain(ids).logits, want, atol=1e-2)


@both
@torch.no_grad()
def test_t5s_classifier_and_its_loss_are_what_they_are_by_hand(layers):
    for kind in ("SequenceClassification", "Seq2SeqLM"):
        plain = base("t5", kind)
        model, ids = attached(plain, layers), words(6)
        labels = torch.tensor([2]) if kind == "SequenceClassification" else words(4)
        spliced, handles = by_hand(plain, model, ids, cut=6)
        encoded = plain.get_encoder()(inputs_embeds=spliced).last_hidden_state
        for handle in handles:
            handle.remove()
        want = plain(input_ids=ids, encoder_outputs=(encoded,), labels=labels)
        got = model(input_ids=ids, labels=labels)
        assert torch.allclose(got.logits, want.logits, atol=1e-5) and torch.allclose(got.loss, want.loss, atol=1e-5)
        assert got.logits.shape == plain(input_ids=ids, labels=labels).logits.shape


@both
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@pytest.mark.parametrize("prefix, infix", [(PREFIX, INFIX), (PREFIX, 0), (0, INFIX)])
@torch.no_grad()
def test_a_language_models_loss_is_that_of_the_spliced_rows(shape, layers, prefix, infix):
    plain = base(shape, "CausalLM")
    model, ids, prompt = attached(plain, layers, prefix, infix), words(9), 4
    labels = ids.clone()
    labels[:, :prompt] = -100
    spliced, _ = by_hand(plain, model, ids, cut=prompt)
    nothing = torch.full((1, prefix), -100), torch.full((1, infix), -100)
    longer = torch.cat([nothing[0], labels[:, :prompt], nothing[1], labels[:, prompt:]], 1)
    want, got = plain(inputs_embeds=spliced, labels=longer), model(ids, labels=labels)
    assert torch.allclose(got.loss, want.loss, atol=1e-5)
    own = [*range(prefix, prefix + prompt), *range(prefix + prompt + infix, prefix + infix + 9)]
    own[prompt - 1] += infix  # the last virtual token is what predicts the first label
    assert torch.allclose(got.logits, want.logits[:, own], atol=1e-4)


@torch.no_grad()
def test_the_infix_ends_a_row_without_labels_whatever_the_row_or_the_forward_before():
    model, ids = attached(base("gpt2", "CausalLM"), True), words(6)
    want = model(ids).logits
    pair, labels = ids.expand(2, -1), ids.repeat(2, 1)
    labels[0], labels[1, :3] = -100, -100
    got = model(pair, labels=labels).logits
    assert torch.allclose(got[:1], want, atol=1e-5) and not torch.allclose(got[1:], want, atol=1e-2)
    states = model.base_model(ids).last_hidden_state
    assert torch.allclose(model.lm_head(states), want, atol=1e-5)


@both
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", ["bert", "roberta", "deberta-v2", "gpt2", "llama", "t5"])
@torch.no_grad()
def test_a_row_alone_and_in_a_padded_batch_is_the_same(shape, layers, side):
    # Heads that read the first column, or T5's that derives the decoder's tokens, need right padding without any
    # virtual token too; the hidden states of real tokens do not.
    model = attached(base(shape), layers)
    rows = [words(length) for length in (7, 4, 6)]
    batch = padded(rows, side, model.config.pad_token_id)
    if shape in ("bert", "gpt2") and side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if side == "right" or shape in ("gpt2", "llama"):
        whole = model(**batch).logits
        alone = torch.cat([model(row).logits for row in rows])
    else:
        states = reader_of(model)(**batch).last_hidden_state
        mask = batch["attention_mask"]
        if shape == "t5":  # what the decoder reads has the virtual tokens in it
            mask = Layout.of(mask.bool(), PREFIX, INFIX).insert(mask)
        whole = states[mask.bool()]
        alone = torch.cat([reader_of(model)(row).last_hidden_state[0] for row in rows])
    assert torch.allclose(whole, alone, atol=1e-5)


@both
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@torch.no_grad()
def test_prompts_of_different_length_keep_their_loss_in_a_padded_batch(shape, layers, side):
    model = attached(base(shape, "CausalLM"), layers)
    rows, prompts = [words(length) for length in (7, 4, 6)], [5, 1, 3]
    labels = [row.clone() for row in rows]
    for row, prompt in zip(labels, prompts, strict=True):
        row[:, :prompt] = -100
    batch = padded(rows, side, 0)
    batch["labels"] = padded(labels, side, -100)["input_ids"]
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    counts = torch.tensor([float(row.shape[1] - prompt) for row, prompt in zip(rows, prompts, strict=True)])
    alone = torch.stack([model(row, labels=told).loss for row, told in zip(rows, labels, strict=True)])
    assert torch.allclose(model(**batch).loss, (alone * counts).sum() / counts.sum(), atol=1e-5)


@pytest.mark.parametrize(
    "shape, kind",
    [
        *((shape, "SequenceClassification") for shape in ("bert", "deberta-v2", "gpt2", "llama", "t5")),
        *((shape, "TokenClassification") for shape in ("bert", "roberta", "deberta-v2", "gpt2", "t5")),
        *((shape, "CausalLM") for shape in ("gpt2", "llama")),
        *((shape, "MaskedLM") for shape in ("bert", "deberta-v2")),
        ("bert", "QuestionAnswering"),
        ("t5", "Seq2SeqLM"),
    ],
)
@both
@torch.no_grad()
def test_outputs_have_the_shapes_that_they_have_without_virtual_tokens(shape, kind, layers):
    plain = base(shape, kind, **({"num_labels": 2} if kind == "QuestionAnswering" else {}))
    model = attached(plain, layers)
    batch = padded([words(length) for length in (7, 4, 6)], "right", plain.config.pad_token_id)
    if kind == "Seq2SeqLM":
        batch["decoder_input_ids"] = words(5).expand(3, -1)
    want, got = (m(**batch, output_hidden_states=True) for m in (plain, model))
    assert list(want) == list(got)
    for name in want:
        if isinstance(want[name], torch.Tensor) and name != "encoder_last_hidden_state":
            assert got[name].shape == want[name].shape, name
    states = "decoder_hidden_states" if "decoder_hidden_states" in want else "hidden_states"
    assert [h.shape for h in got[states]] == [h.shape for h in want[states]]
    # A tuple in place of a named output holds the same.
    for tensor, named in zip(model(**batch, return_dict=False), model(**batch).values(), strict=True):
        assert not isinstance(named, torch.Tensor) or torch.equal(tensor, named)


@torch.no_grad()
def test_the_model_without_a_head_and_positional_arguments_work_too():
    torch.manual_seed(0)
    plain = transformers.BertModel(config("bert")).eval()
    model = attached(plain, True)
    batch = padded([words(5), words(3)], "right", 0)
    types = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    named = model(**batch, token_type_ids=types)
    assert named.last_hidden_state.shape == (2, 5, 16)
    assert torch.equal(
        model(batch["input_ids"], batch["attention_mask"], types).last_hidden_state, named.last_hidden_state
    )


@torch.no_grad()
def test_token_types_are_those_of_the_neighbours():
    plain = base("bert")
    model, ids = attached(plain, False), words(5)
    spliced, _ = by_hand(plain, model, ids, cut=5, start=1)
    types = torch.tensor([[0, 0, 0, 1, 1]])
    longer = torch.tensor([[0, *[0] * PREFIX, 0, 0, 1, 1, *[1] * INFIX]])
    want = plain(inputs_embeds=spliced, token_type_ids=longer).logits
    assert torch.allclose(model(ids, token_type_ids=types).logits, want, atol=1e-5)


# Generating


@both
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@torch.no_grad()
def test_generating_with_the_cache_gives_the_scores_of_full_forwards(shape, layers):
    model = attached(base(shape, "CausalLM"), layers)
    prompts = padded([words(length, seed=3) for length in LENGTHS], "left", 0)
    made = model.generate(
        **prompts, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    ids, width = made.sequences, prompts["input_ids"].shape[1]
    assert ids.shape == (len(LENGTHS), width + 6)
    labels = ids.clone()
    labels[:, :width] = -100  # tells the full forward where the prompt ends
    mask = torch.cat([prompts["attention_mask"], torch.ones(len(ids), 6, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    full = model(ids, attention_mask=mask, position_ids=positions, labels=labels).logits
    assert torch.allclose(torch.stack(made.logits, 1), full[:, width - 1 : -1], atol=1e-4)
    for place, length in enumerate(LENGTHS):  # and padding changes nothing
        alone = model.generate(words(length, seed=3), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert torch.equal(alone[0, length:], ids[place, width:])


@both
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@torch.no_grad()
def test_beams_have_the_probability_that_full_forwards_give_them(shape, layers):
    model = attached(base(shape, "CausalLM"), layers)
    prompts = padded([words(6), words(3)], "left", 0)
    made = model.generate(
        **prompts, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=4, num_return_sequences=4,
        length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    ids = made.sequences
    labels = ids.clone()
    labels[:, :6] = -100
    mask = torch.cat([prompts["attention_mask"].repeat_interleave(4, 0), torch.ones(8, 5, dtype=torch.long)], 1)
    full = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), labels=labels).logits
    likely = full[:, 5:-1].log_softmax(-1).gather(2, ids[:, 6:, None]).sum((1, 2))
    assert torch.allclose(made.sequences_scores, likely, atol=1e-3)


@both
@torch.no_grad()
def test_t5_generates_the_same_with_cache_without_and_in_beams_of_one_prompt(layers):
    model = attached(base("t5", "Seq2SeqLM"), layers)
    rows = [words(length) for length in LENGTHS]
    prompts = padded(rows, "right", 0)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    cached = model.generate(**prompts, **options, output_logits=True)
    full = model.generate(**prompts, **options, output_logits=True, use_cache=False)
    assert torch.allclose(torch.stack(cached.logits), torch.stack(full.logits), atol=1e-4)
    decoded = model(**prompts, decoder_input_ids=cached.sequences).logits
    assert torch.allclose(torch.stack(cached.logits, 1), decoded[:, :-1], atol=1e-4)
    beams = model.generate(**prompts, **options, num_beams=3)
    for place, row in enumerate(rows):
        assert torch.equal(model.generate(row, **options, num_beams=3).sequences[0], beams.sequences[place])
    # The states that the encoder gave may be given back with the caller's own mask.
    encoded = model.get_encoder()(**prompts)
    again = model(encoder_outputs=encoded, attention_mask=prompts["attention_mask"], decoder_input_ids=cached.sequences)
    assert torch.allclose(again.logits, decoded, atol=1e-5)


@torch.no_grad()
def test_a_prefix_alone_generates_without_a_cache_too():
    model = attached(base("gpt2", "CausalLM"), True, infix=0)
    prompts = padded([words(6), words(3)], "left", 0)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**prompts, **options), model.generate(**prompts, **options, use_cache=False))


@torch.no_grad()
def test_a_loop_of_ones_own_goes_on_from_the_cache():
    model = attached(base("gpt2", "CausalLM"), True)
    ids, labels = words(8), words(8)
    labels[:, :5] = -100
    full = model(ids, labels=labels).logits
    begun = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=begun.past_key_values).logits
    assert torch.allclose(torch.cat([begun.logits[:, 4:], rest], 1), full[:, 4:], atol=1e-4)


def test_a_cache_that_does_not_fit_is_refused():
    model = attached(base("gpt2", "CausalLM"), False)
    prompt, options = words(6), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    made = model.generate(prompt, **options, return_dict_in_generate=True)
    with pytest.raises(rw.InputError, match="do not pass generate a cache that it returned"):
        longer = torch.cat([made.sequences, words(12)], 1)
        model.generate(longer, **options, past_key_values=made.past_key_values)
    with pytest.raises(rw.InputError, match="static cache"):
        model.generate(prompt, **options, cache_implementation="static", disable_compile=True)
    with pytest.raises(rw.InputError, match="use_cache=True"):
        model.generate(prompt, **options, use_cache=False)


# Training


@both
@pytest.mark.parametrize("shape", ["bert", "deberta-v2", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_leaves_the_gradients(shape, layers, reentrant):
    model = attached(base(shape), layers)
    want = gradients(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    models.recompute(model.train(), {"use_reentrant": reentrant})
    got = gradients(model)
    assert want.keys() == got.keys() == {f"virtual_tokens.{n}" for n, _ in model.virtual_tokens.named_parameters()}
    assert all(torch.allclose(want[name], got[name], atol=1e-6) and got[name].any() for name in want)


def gradients(model):
    model.zero_grad()
    rows = [words(length) for length in (7, 4, 6)]
    model(**padded(rows, "right", model.config.pad_token_id), labels=torch.tensor([0, 1, 2])).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Rerun(nn.Module):
    """A block that is run again in the backward, hooks and all, as early versions of transformers 5 do it."""

    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, *args, **kwargs):
        return checkpoint(lambda *a: self.block(*a, **kwargs), *args, use_reentrant=self.reentrant)


def test_hooks_that_run_again_in_the_backward_know_their_own_forward():
    batches = [padded([words(n) for n in lengths], "right", 0) for lengths in ((7, 4), (3, 7), (5, 2))]
    plainly, again = (attached(base("gpt2"), True) for _ in range(2))
    stack = blocks_of(again)
    for place, block in enumerate(stack):
        stack[place] = Rerun(block, False)
    for model in (plainly, again):
        losses = [model(**batch, labels=torch.tensor([0, 2]), use_cache=False).loss for batch in batches]
        with torch.no_grad():
            model(**batches[0])
        sum(losses).backward()
    for (name, p), q in zip(plainly.named_parameters(), again.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-6), name


def test_hooks_that_run_again_without_knowing_their_forward_are_refused():
    model = attached(base("gpt2"), True)
    stack = blocks_of(model)
    for place, block in enumerate(stack):
        stack[place] = Rerun(block, True)
    with pytest.raises(rw.InputError, match="use_reentrant=False"):
        gradients(model)


@pytest.mark.large
@pytest.mark.parametrize("shape", ["bert", "gpt2"])
def test_compiled_it_is_the_same_also_beside_a_plain_model_that_is_compiled(shape):
    torch._dynamo.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # as torch has it

    def compiled(model):
        with torch.no_grad():
            return torch.compile(model, backend="aot_eager")(**batch).logits

    plain = base(shape).requires_grad_(False)
    batch = padded([words(length) for length in (7, 4, 6)], "right", 0)
    before = compiled(plain)  # nothing but the hooks tells the next models from this one
    adapted = [attached(plain, layers) for layers in (False, True)]
    for model in adapted:
        assert torch.allclose(compiled(model), model(**batch).logits, atol=1e-5)
    assert torch.allclose(compiled(plain), before) and torch.allclose(before, plain(**batch).logits, atol=1e-5)
    assert not torch.allclose(before, compiled(adapted[0]), atol=1e-2)
    for model in adapted:
        want = gradients(model)
        got = gradients(torch.compile(model, backend="aot_eager"))
        assert all(torch.allclose(got[f"_orig_mod.{name}"], want[name], atol=1e-5) for name in want)


@both
def test_a_copy_learns_by_itself(layers):
    model = attached(base("bert"), layers)
    twin = copy.deepcopy(model)
    before = models.logits(model)
    assert torch.equal(models.logits(twin), before)
    with torch.no_grad():
        for p in twin.virtual_tokens.parameters():
            p.zero_()
    assert torch.equal(models.logits(model), before) and not torch.allclose(models.logits(twin), before)


# What is refused


def refuses(message, call, *args, **kwargs):
    with pytest.raises(rw.InputError, match=message) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_inputs_that_do_not_fit_get_one_clear_line():
    model = attached(base("bert"), False)
    ids = words(5)
    refuses("pass input_ids and not inputs_embeds", model, inputs_embeds=torch.zeros(1, 5, 16))
    refuses("one row of 0 and 1", model, ids, attention_mask=torch.ones(1, 1, 5, 5))
    refuses("shapes must be equal", model, ids, attention_mask=torch.ones(1, 6))
    refuses("already has virtual tokens", add_virtual_tokens, model, 1, 1)
    refuses("transformers model, not a Linear", add_virtual_tokens, nn.Linear(2, 2), 1, 1)


@pytest.mark.parametrize("kind", ["canine", "perceiver"])
def test_a_model_without_a_table_of_tokens_is_refused(kind):
    config = models.small_config(kind)
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    refuses("token embeddings, but .* has no table of them", add_virtual_tokens, model, 1, 1)


def test_training_a_language_model_with_an_infix_needs_labels():
    model = attached(base("gpt2", "CausalLM"), False).train()
    refuses("label_smoothing_factor", model, words(5))
    with torch.no_grad():
        model(words(5))
    attached(base("gpt2", "CausalLM"), False, infix=0).train()(words(5))


@pytest.mark.parametrize("shape", ["bert", "roberta", "gpt2"])
@torch.no_grad()
def test_a_row_may_fill_the_models_positions_and_no_more(shape):
    model = attached(base(shape), True)
    most = 32 - PREFIX - INFIX
    assert model(words(most)).logits.shape == (1, 3)
    refuses(f"row of {most + 1} tokens and 5 .* 32 positions: truncate rows to {most} tokens", model, words(most + 1))
    refuses("32 virtual tokens leave no room in the 32 positions", add_virtual_tokens, base(shape), 30, 2)
    add_virtual_tokens(base(shape), 29, 2)


@torch.no_grad()
def test_padding_beyond_the_positions_is_no_harm_where_it_has_none():
    """GPT-2 with positions that leave padding out, RoBERTa always: wide is not long."""
    for shape, side in (("gpt2", "left"), ("roberta", "right")):
        model = attached(base(shape), False)
        wide = {name: value[:1] for name, value in padded([words(20), words(31)], side, 0).items()}
        if shape == "gpt2":
            wide["position_ids"] = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert torch.allclose(model(**wide).logits, model(words(20)).logits, atol=1e-5)


@torch.no_grad()
def test_generation_stops_at_the_models_positions_with_a_clear_line():
    model = attached(base("gpt2", "CausalLM"), False)
    refuses("32 positions", model.generate, words(10), max_new_tokens=20, min_new_tokens=20, do_sample=False)


@pytest.mark.parametrize("shape", ["llama", "deberta-v2"])
@torch.no_grad()
def test_relative_positions_have_no_end(shape):
    model = attached(base(shape), False)
    assert model(words(32)).logits.shape == (1, 3)
    refuses("leave no room", add_virtual_tokens, base(shape), 32, 0)
