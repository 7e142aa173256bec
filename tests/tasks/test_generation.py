"""What the family promises of every model: what it reads, what its loss counts, and what it writes."""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise import methods
from rankwise.errors import InputError, NotFiniteError
from rankwise.tasks import Evaluation, Split, subset
from rankwise.tasks.generation import IGNORE, Generation, Judged, _NoRepeat
from rankwise.train import random_model
from rankwise.train.trainer import RankTrainer

KINDS = ("gpt2", "llama", "t5")
every_kind = pytest.mark.parametrize("kind", KINDS)

SOURCES = ["one two", "three four five six seven", "eight", "nine ten eleven", "two two two two two two two", "six one"]
TARGETS = ["red", "green blue red", "blue blue", "white black", "green", "black red white blue"]


@dataclass(frozen=True)
class Colours(Generation):
    """Numbers into colours."""

    main = "same"
    metrics = ("same",)

    target_length: int = 8
    beams: int = 1

    def train(self) -> Split:
        columns = {"source": SOURCES, "target": TARGETS, "idx": list(range(len(SOURCES)))}
        return Split("train", Dataset.from_dict(columns), True)

    def evaluation(self) -> list[Split]:
        references = [[target, *(["another one"] if i % 2 else [])] for i, target in enumerate(TARGETS)]
        data = self.train().data.remove_columns("target").add_column("references", references)
        return [Split("validation", data, True, suffix="_more")]

    def score_texts(self, hypotheses, split):
        found = [float(text in group) for text, group in zip(hypotheses, split.data["references"], strict=True)]
        return Judged({"same": sum(found) / len(found)}, found, ("a note",))


def tokenizer_of(kind: str):
    task = Colours()
    return random_model.build(f"random-{kind}", task, task.train())[0]


def model_of(kind: str, words: int, seed: int = 0, **more):
    config = {
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=words, n_embd=32, n_layer=2, n_head=2, n_positions=64, tie_word_embeddings=False, **more
        ),
        "llama": lambda: transformers.LlamaConfig(
            vocab_size=words, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, **more,
        ),
        "t5": lambda: transformers.T5Config(
            vocab_size=words, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0,
            tie_word_embeddings=False, **more,
        ),
        "bert": lambda: transformers.BertConfig(
            vocab_size=words, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        ),
    }[kind]()  # fmt: skip
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, 2
    kinds = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    model = kinds.from_config(config)
    with torch.no_grad():  # far from uniform, so that a wrong token is a large difference
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def given_model(request):
    tokenizer = tokenizer_of(request.param)
    return model_of(request.param, len(tokenizer)), tokenizer


def encoded(task, tokenizer, split=None, max_length=16):
    return task.encode(split or task.train(), tokenizer, max_length)


# what the model gets


@every_kind
def test_encode_cuts_both_sides_and_ends_each_target(kind):
    tokenizer, end = tokenizer_of(kind), 1
    task = Colours(prefix="say: ", target_length=3)
    rows = encoded(task, tokenizer, max_length=4)
    assert rows.column_names == ["input_ids", "targets", "length"]
    assert not rows.cache_files
    for row, source, target in zip(rows, SOURCES, TARGETS, strict=True):
        whole = tokenizer(f"say: {source}", add_special_tokens=False)["input_ids"]
        # T5's tokenizer ends each text with a mark, which a cut must not take away
        assert row["input_ids"] == (whole[:3] + [end] if kind == "t5" else whole[:4])
        assert row["targets"] == [[*tokenizer(target, add_special_tokens=False)["input_ids"][:2], end]]
        assert row["length"] == len(row["input_ids"]) + len(row["targets"][0])


def test_encode_takes_all_references_and_any_subset():
    tokenizer, task = tokenizer_of("gpt2"), Colours(target_length=32)
    (split,) = task.evaluation()
    rows = encoded(task, tokenizer, split)
    assert [len(row["targets"]) for row in rows] == [1, 2, 1, 2, 1, 2]
    decoded = [[tokenizer.decode(ids[:-1]) for ids in row["targets"]] for row in rows]
    assert decoded == split.data["references"][:]
    few = subset(split, 3)
    assert encoded(task, tokenizer, few)[:] == rows.select(few.data["idx"][:])[:]


def test_encode_refuses_what_leaves_no_room_no_rows_and_no_end():
    task, tokenizer = Colours(), tokenizer_of("t5")
    with pytest.raises(InputError, match="max_length=1"):
        encoded(task, tokenizer, max_length=1)
    with pytest.raises(InputError, match="has no rows"):
        encoded(task, tokenizer, Split("train", task.train().data.select([]), True))
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end token"):
        encoded(task, tokenizer)


PAIRS = st.lists(
    st.tuples(st.lists(st.integers(3, 40), max_size=9), st.lists(st.integers(41, 80), max_size=6)),
    min_size=1,
    max_size=5,
)


def batch_of(model, tokenizer, pairs):
    rows = [{"input_ids": s, "targets": [[*t, 1]], "length": len(s) + len(t) + 1} for s, t in pairs]
    return Colours().collate(model, tokenizer, 0)(rows)


@given(pairs=PAIRS)
@settings(deadline=None, max_examples=30)
def test_a_decoders_loss_masks_exactly_prompt_and_padding(pairs):
    tokenizer = tokenizer_of("gpt2")
    batch = batch_of(model_of("gpt2", 320), tokenizer, pairs)
    for (source, target), ids, mask, labels in zip(
        pairs, batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist(), strict=True
    ):
        row = [*source, 1, *target, 1]
        rest = len(ids) - len(row)
        assert ids[: len(row)] == row
        assert mask == [1] * len(row) + [0] * rest
        assert labels == [IGNORE] * (len(source) + 1) + [*target, 1] + [IGNORE] * rest


@given(pairs=PAIRS)
@settings(deadline=None, max_examples=30)
def test_an_encoder_gets_the_sources_and_no_target_token(pairs):
    tokenizer = tokenizer_of("t5")
    batch = batch_of(model_of("t5", 320), tokenizer, pairs)
    for (source, target), ids, mask, labels in zip(
        pairs, batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist(), strict=True
    ):
        assert [each for each, real in zip(ids, mask, strict=True) if real] == source
        assert not set(ids) & set(range(41, 81))
        assert [label for label in labels if label != IGNORE] == [*target, 1]


def outputs_of(model, batch):
    """Logits of a batch, and what went into the encoder and came out of it, if there is one."""
    seen = []
    encoder = model.get_encoder() if model.config.is_encoder_decoder else None
    hooks = [] if encoder is None else [
        encoder.register_forward_hook(
            lambda _, args, kwargs, out: seen.append((kwargs.get("input_ids"), out[0])), with_kwargs=True
        )
    ]  # fmt: skip
    with torch.no_grad():
        logits = model(**batch).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


@every_kind
@pytest.mark.parametrize("where", range(4))
def test_nothing_depends_on_a_target_token_before_it_is_written(kind, where):
    """Change the target from `where` on: all that was computed for what comes before stays the same, to the bit."""
    tokenizer = tokenizer_of(kind)
    model = model_of(kind, 320)
    source, target = [5, 6, 7, 8, 9], [50, 51, 52, 53]
    other = target[:where] + [each + 20 for each in target[where:]]
    (first, seen), (second, seen_too) = (
        outputs_of(model, batch_of(model, tokenizer, [(source, each)])) for each in (target, other)
    )
    # The logits of target token k are in column k of an encoder-decoder, and in that of the token before it else.
    begins = 0 if kind == "t5" else len(source)
    assert torch.equal(first[:, : begins + where + 1], second[:, : begins + where + 1])
    assert not torch.equal(first, second)
    assert len(seen) == len(seen_too) == (kind == "t5")
    for (ids, states), (ids_too, states_too) in zip(seen, seen_too, strict=True):
        assert torch.equal(ids, ids_too)
        assert torch.equal(states, states_too)
        assert not set(ids.flatten().tolist()) & {*target, *other}


@every_kind
def test_the_prompt_of_an_output_is_the_prompt_of_the_training(kind, monkeypatch):
    """What `generate` reads is what a training row has before its first label; no reference is in it."""
    tokenizer = tokenizer_of(kind)
    task, model = Colours(), model_of(kind, len(tokenizer))
    examples = encoded(task, tokenizer)
    read = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: read.append(given) or generate(**given))
    task.generate(model, examples, tokenizer, 1)
    batches = [task.collate(model, tokenizer, 0)([row]) for row in examples]
    trained = []
    for batch in batches:
        told = (batch["labels"][0] != IGNORE).nonzero()[0].item()
        trained.append(batch["input_ids"][0].tolist() if kind == "t5" else batch["input_ids"][0, :told].tolist())
    assert sorted(given["input_ids"][0].tolist() for given in read) == sorted(trained)


# what a decoder must be


def test_a_model_that_reads_ahead_is_refused():
    tokenizer = tokenizer_of("gpt2")
    with pytest.raises(InputError, match="BertLMHeadModel reads the tokens after"):
        Colours().collate(model_of("bert", len(tokenizer)), tokenizer, 0)


def test_rows_longer_than_the_model_are_refused():
    tokenizer = tokenizer_of("gpt2")
    model = model_of("gpt2", len(tokenizer))
    long = [{"input_ids": [5] * 60, "targets": [[6] * 4], "length": 64}]
    with pytest.raises(InputError, match="65 tokens, more than the 64"):
        Colours().collate(model, tokenizer, 0)(long)
    task = Colours(target_length=60)
    (split,) = task.evaluation()
    examples = encoded(task, tokenizer, split)
    with pytest.raises(InputError, match="more than the 64 of the model"):
        task.generate(model, examples, tokenizer, 4)
    with pytest.raises(InputError, match="more than the 64 of the model"):  # at the first look, not at the last
        task.evaluate(model, Evaluation(split, examples), tokenizer, 4, final=False)


@pytest.mark.parametrize(
    "options", [{"target_length": 1}, {"beams": 0}, {"no_repeat": -1}, {"length_penalty": math.inf}]
)
def test_options_out_of_range(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Colours(**options)


# the loss


def by_hand(model, examples):
    """Sum of -log p over all target tokens / their number, one row at a time and without padding."""
    total, count = 0.0, 0
    for row in examples:
        for target in row["targets"]:
            source = row["input_ids"]
            with torch.no_grad():
                if model.config.is_encoder_decoder:
                    begun = torch.tensor([[0, *target[:-1]]])
                    logits = model(input_ids=torch.tensor([source]), decoder_input_ids=begun).logits[0]
                else:
                    ids = [*source, 1, *target]
                    logits = model(input_ids=torch.tensor([ids])).logits[0, len(source) : -1]
            logs = logits.double().log_softmax(-1)
            total -= logs[range(len(target)), target].sum().item()
            count += len(target)
    return total / count


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_the_loss_is_per_target_token_whatever_the_batches(given_model, size):
    model, tokenizer = given_model
    task = Colours()
    (split,) = task.evaluation()
    examples = encoded(task, tokenizer, split)
    scored = task.evaluate(model, Evaluation(split, examples), tokenizer, size, final=False)
    assert scored.metrics == {"loss_more": pytest.approx(by_hand(model, examples), rel=1e-5)}
    assert scored.rows.num_rows == 0
    assert scored.notes == ()


def test_a_training_batch_has_the_loss_of_the_evaluation(given_model):
    model, tokenizer = given_model
    examples = encoded(Colours(), tokenizer)
    with torch.no_grad():
        loss = model(**Colours().collate(model, tokenizer, 0)(list(examples))).loss.item()
    assert loss == pytest.approx(by_hand(model, examples), rel=1e-5)


INFIX = {"name": "pre-layer", "prefix": 2, "infix": 3}  # which stands where the labels begin


@pytest.mark.parametrize(
    ("kind", "pieces", "options"),
    [
        *((kind, pieces, {"name": "full"}) for kind, pieces in [("t5", 1), ("gpt2", 1), ("gpt2", 2), ("llama", 6)]),
        *(("gpt2", 2, INFIX), ("t5", 1, INFIX)),
    ],
)
def test_smoothed_labels_spread_over_all_tokens_and_count_no_masked_one(kind, pieces, options, tmp_path):
    tokenizer = tokenizer_of(kind)
    dropouts = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "llama": (), "t5": ("dropout_rate",)}
    model = model_of(kind, len(tokenizer), **dict.fromkeys(dropouts[kind], 0.0))
    examples, collate = encoded(Colours(), tokenizer), Colours().collate(model, tokenizer, 0)
    method = methods.build(options)
    model = method.attach(model)
    batch = collate(list(examples))
    with torch.no_grad():
        logits, labels = model(**batch).logits, batch["labels"]
    if kind != "t5":  # a decoder's logits are those of the token that follows
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, label_smoothing=0.3
    )
    trainer = RankTrainer(
        method=method,
        model=model,
        args=transformers.TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=6 // pieces, gradient_accumulation_steps=pieces,
            label_smoothing_factor=0.3, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
            save_strategy="no", remove_unused_columns=False,
        ),
        train_dataset=examples,
        data_collator=collate,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_loss_that_is_not_finite_is_told(given_model):
    model, tokenizer = given_model
    task = Colours()
    (split,) = task.evaluation()
    evaluation = Evaluation(split, encoded(task, tokenizer, split))
    weight = next(model.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    model.train()
    try:
        with pytest.raises(NotFiniteError, match="diverged"):
            task.evaluate(model, evaluation, tokenizer, 2, final=True)
        assert model.training
    finally:
        model.eval()
        with torch.no_grad():
            weight.copy_(kept)


# what it writes


def greedy(model, row, tokenizer, length):
    """The likeliest token at each step, by forwards of the whole row without a cache."""
    written = []
    while len(written) < length and (not written or written[-1] != 1):
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                ids = torch.tensor([row["input_ids"]])
                logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[0, *written]])).logits
            else:
                logits = model(input_ids=torch.tensor([[*row["input_ids"], 1, *written]])).logits
        written.append(logits[0, -1].argmax().item())
    return tokenizer.decode([each for each in written if each != 1], skip_special_tokens=True).strip()


@pytest.mark.parametrize("size", [1, 4, 6])
def test_one_beam_is_greedy_with_rows_of_any_length_side_by_side(given_model, size):
    model, tokenizer = given_model
    task = Colours()
    examples = encoded(task, tokenizer)
    expected = [greedy(model, row, tokenizer, task.target_length) for row in examples]
    assert task.generate(model, examples, tokenizer, size) == expected
    assert len(set(expected)) > 1


def next_logs(model, row, written):
    """log p of every next token after each of `written`, texts of one length: (texts, words)."""
    if model.config.is_encoder_decoder:
        begun = torch.tensor([[0, *ids] for ids in written])
        batch = {"input_ids": torch.tensor([row["input_ids"]] * len(written)), "decoder_input_ids": begun}
    else:
        batch = {"input_ids": torch.tensor([[*row["input_ids"], 1, *ids] for ids in written])}
    with torch.no_grad():
        return model(**batch).logits[:, -1].double().log_softmax(-1)


@contextmanager
def end_as_likely(model, by):
    """The end token's logit at every step, `by` above that of the likeliest token."""

    def raised(_, args, out):
        return torch.cat([out[..., :1], out.amax(-1, keepdim=True) + by, out[..., 2:]], -1)

    hook = model.get_output_embeddings().register_forward_hook(raised)
    try:
        yield
    finally:
        hook.remove()


def test_beams_for_every_word_find_the_best_of_all_texts(given_model):
    """With two tokens at most the search is then exhaustive: the end at once, or the best pair, each over n^p."""
    model, tokenizer = given_model
    words = len(tokenizer)
    examples = encoded(Colours(), tokenizer)
    found = []
    with end_as_likely(model, -0.5):
        for p in (-2.0, 0.0, 1.0, 4.0):
            task = Colours(target_length=2, beams=words, length_penalty=p)
            found.append(task.generate(model, examples, tokenizer, 6))
            for row, text in zip(examples, found[-1], strict=True):
                firsts = next_logs(model, row, [[]])[0]
                pairs = firsts[:, None] + next_logs(model, row, [[first] for first in range(words)])
                pairs[1] = -math.inf  # nothing follows the end
                first, second = divmod(int(pairs.argmax()), words)
                ids = [] if firsts[1] >= pairs[first, second] / 2**p else [first, *([] if second == 1 else [second])]
                assert text == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert found[0] != found[-1]  # the penalty matters in this


def test_a_text_ends_at_its_mark_or_at_its_longest(given_model, monkeypatch):
    model, tokenizer = given_model
    examples = encoded(Colours(), tokenizer)
    made = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: made.append(generate(**given)) or made[-1])
    for task in (Colours(target_length=2), Colours(target_length=5, beams=3)):
        task.generate(model, examples, tokenizer, 6)
        begun = 1 if model.config.is_encoder_decoder else 1 + max(map(len, examples["input_ids"]))
        assert made[-1].shape[1] == begun + task.target_length
    with end_as_likely(model, 50.0):
        assert Colours(beams=2).generate(model, examples, tokenizer, 6) == [""] * 6


@given(
    rows=st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=9), min_size=1, max_size=3),
    n=st.integers(1, 4),
    begun=st.integers(0, 9),
)
@settings(deadline=None)
def test_no_ngram_comes_twice_in_what_is_written_alone(rows, n, begun):
    scores = _NoRepeat(n, begun)(torch.tensor(rows), torch.zeros(len(rows), 5))
    for row, found in zip(rows, scores.tolist(), strict=True):
        written = row[begun:]
        grams = {tuple(written[i : i + n]) for i in range(len(written) - n + 1)}
        tail = written[len(written) - n + 1 :] if len(written) >= n - 1 else None
        banned = {word for word in range(5) if tail is not None and (*tail, word) in grams}
        assert {word for word, value in enumerate(found) if value == -math.inf} == banned


def test_outputs_repeat_nothing_where_they_must_not(given_model):
    model, tokenizer = given_model
    examples = encoded(Colours(), tokenizer)
    for beams in (1, 3):
        for text in Colours(target_length=24, no_repeat=2, beams=beams).generate(model, examples, tokenizer, 6):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(ids) > 1
    # the rule does something: without it these models go round in circles
    free = Colours(target_length=24).generate(model, examples, tokenizer, 6)
    held = Colours(target_length=24, no_repeat=2).generate(model, examples, tokenizer, 6)
    assert free != held


def test_the_models_own_settings_decide_nothing_and_stay(given_model, recwarn):
    model, tokenizer = given_model
    task = Colours(beams=2)
    examples = encoded(task, tokenizer)
    expected = task.generate(model, examples, tokenizer, 3)
    plain = model.generation_config
    own = transformers.GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, max_length=3, min_new_tokens=7, repetition_penalty=5.0,
        forced_eos_token_id=5, eos_token_id=[7, 8], bad_words_ids=[[5], [6]], pad_token_id=0, bos_token_id=2,
    )  # fmt: skip
    model.generation_config = own
    try:
        before = torch.random.get_rng_state()
        assert task.generate(model, examples, tokenizer, 3) == expected
        assert torch.equal(torch.random.get_rng_state(), before)
        assert model.generation_config is own
    finally:
        model.generation_config = plain


def test_evaluation_says_what_was_written_for_each_row(given_model):
    model, tokenizer = given_model
    task = Colours()
    (split,) = task.evaluation()
    evaluation = Evaluation(split, encoded(task, tokenizer, split))
    model.train()
    before = torch.random.get_rng_state()
    scored = task.evaluate(model, evaluation, tokenizer, 4, final=True)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)
    model.eval()
    assert set(scored.metrics) == {"loss_more", "same_more"}
    assert scored.notes == ("a note",)
    table = scored.rows.to_pydict()
    assert list(table) == ["split", "idx", "label", "source", "prediction", "references", "score"]
    assert table["split"] == ["validation"] * 6
    assert table["idx"] == list(range(6))
    assert table["label"] == [-1] * 6
    assert table["source"] == SOURCES
    assert table["references"] == split.data["references"][:]
    assert table["prediction"] == task.generate(model, evaluation.examples, tokenizer, 1)
    assert table["score"] == [float(t in g) for t, g in zip(table["prediction"], table["references"], strict=True)]
    again = task.evaluate(model, evaluation, tokenizer, 4, final=True)
    assert again.metrics == scored.metrics
    assert again.rows.equals(scored.rows)


# training and writing speak of the same thing


@every_kind
def test_what_was_learnt_by_heart_is_written(kind):
    tokenizer = tokenizer_of(kind)
    task = Colours(beams=3, no_repeat=3)
    model = model_of(kind, len(tokenizer))
    examples = encoded(task, tokenizer)
    collate = task.collate(model, tokenizer, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):  # in evaluation mode: nothing is dropped
        loss = model(**collate(list(examples))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    (split,) = task.evaluation()
    scored = task.evaluate(model, Evaluation(split, encoded(task, tokenizer, split)), tokenizer, 4, final=True)
    assert scored.rows["prediction"].to_pylist() == TARGETS
    assert scored.metrics["same_more"] == 1.0


OPTIONS = {
    "lora": {"rank": 2},
    "sora": {"rank": 2},
    "simplex-lora": {"rank": 2},
    "dora": {"rank": 2},
    "adapter-h": {"size": 2},
    "pre-embed": {"prefix": 2, "infix": 1},
    "pre-layer": {"prefix": 2, "infix": 2},
}


@every_kind
@pytest.mark.parametrize("name", OPTIONS)
def test_with_a_method_on_the_model_rows_are_written_as_if_alone(kind, name):
    tokenizer = tokenizer_of(kind)
    task = Colours(beams=2)
    torch.manual_seed(3)
    model = methods.build({"name": name, **OPTIONS[name]}).attach(model_of(kind, len(tokenizer)))
    with torch.no_grad():  # away from the start, at which most methods do nothing
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    (split,) = task.evaluation()
    examples = encoded(task, tokenizer, split)
    together = task.evaluate(model, Evaluation(split, examples), tokenizer, 6, final=True)
    alone = task.evaluate(model, Evaluation(split, examples), tokenizer, 1, final=True)
    assert together.rows["prediction"].to_pylist() == alone.rows["prediction"].to_pylist()
    assert together.metrics["loss_more"] == pytest.approx(alone.metrics["loss_more"], rel=1e-4)
    untouched = task.generate(model_of(kind, len(tokenizer)), examples, tokenizer, 6)
    assert together.rows["prediction"].to_pylist() != untouched
