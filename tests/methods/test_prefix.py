"""PreEmbed and PreLayer: what trains, how many parameters that is, and that nothing else changes."""

import copy

import peft
import pytest
import torch
import transformers
from transformers import TrainingArguments

import models
import rankwise as rw
from rankwise.methods import build
from rankwise.methods.prefix import PreEmbed, PreLayer

both = pytest.mark.parametrize("kind", [PreEmbed, PreLayer])
PREFIX, INFIX = 3, 2


def attached(kind, shape="bert", prefix=PREFIX, infix=INFIX):
    torch.manual_seed(1)
    return kind(prefix=prefix, infix=infix).attach(models.model(shape), head=models.head(shape))


def language_model(shape):
    made = {
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=models.VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0,
            bos_token_id=2, eos_token_id=1,
        ),
        "llama": lambda: transformers.LlamaConfig(
            vocab_size=models.VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
        ),
        "t5": lambda: transformers.T5Config(
            vocab_size=models.VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0,
            eos_token_id=1, decoder_start_token_id=0,
        ),
    }[shape]()  # fmt: skip
    torch.manual_seed(0)
    kind = transformers.AutoModelForSeq2SeqLM if shape == "t5" else transformers.AutoModelForCausalLM
    return kind.from_config(made).eval()


def trainable(model):
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "method, count", [(PreEmbed(prefix=256, infix=8), 3_244_032), (PreLayer(prefix=8, infix=8), 18_874_368)]
)
def test_gpt3s_parameters_are_counted_without_weights(method, count):
    config = transformers.GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model = method.attach(model)
    assert all(p.is_meta for p in model.parameters())
    assert sum(shape.numel() for shape in trainable(model).values()) == count


@pytest.mark.parametrize("shape", models.SHAPES)
@both
def test_the_virtual_tokens_and_the_head_train_and_nothing_else(kind, shape):
    model = attached(kind, shape)
    layers = 1 if shape == "t5" else 2  # of the encoder
    rows = {"virtual_tokens.embeddings": (5, 16)}
    if kind is PreLayer and layers > 1:
        rows["virtual_tokens.layers"] = (layers - 1, 5, 16)
    head = {
        name: p.shape for name, p in models.model(shape).named_parameters() if name.startswith(models.head(shape)[0])
    }
    assert trainable(model) == {**head, **rows}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    models.train(model, rw.SimplexAdam(kind(), model, lr=1e-2), 3)
    for name, p in model.named_parameters():
        if p.requires_grad and name in rows:
            learns = (p != before[name]).any(-1)
            # What a decoder's last tokens are in the layers before the last is read by no token.
            unread = kind is PreLayer and shape in ("gpt2", "llama") and name.endswith("embeddings")
            want = torch.ones_like(learns)
            want[..., PREFIX:] = not unread
            assert torch.equal(learns, want)
        elif not p.requires_grad:
            assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("shape", ["gpt2", "llama", "t5"])
@both
def test_a_language_model_learns_with_them_alone(kind, shape):
    model = kind(prefix=PREFIX, infix=INFIX).attach(language_model(shape))
    layers = {"virtual_tokens.layers": (1, 5, 16)} if kind is PreLayer else {}
    assert trainable(model) == {"virtual_tokens.embeddings": (5, 16), **layers}
    ids = models.batch()["input_ids"]
    labels = ids.clone()
    labels[:, :4] = -100 if shape != "t5" else 3
    optimizer = rw.SimplexAdam(kind(), model, lr=0.1)
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@both
def test_they_start_as_words_and_the_same_under_one_seed(kind):
    model, again, table = attached(kind), attached(kind), models.model().get_input_embeddings().weight
    tokens = model.virtual_tokens
    assert all((table == row).all(1).any() for row in tokens.embeddings)
    for p, q in zip(tokens.parameters(), again.virtual_tokens.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(tokens.embeddings[0], tokens.embeddings[1])
    if kind is PreLayer:
        many = PreLayer(prefix=8, infix=8).attach(models.model()).virtual_tokens.layers
        assert many.std().item() == pytest.approx(table.std().item(), rel=0.2)


@pytest.mark.parametrize("shape", models.SHAPES)
@both
def test_they_change_the_function_and_say_so(kind, shape):
    assert not kind().exact_start
    assert not torch.equal(models.logits(attached(kind, shape)), models.logits(models.model(shape)))


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@torch.no_grad()
def test_a_prefix_of_embeddings_is_pefts_prompt_tuning(shape):
    ids = models.batch()["input_ids"]
    model = PreEmbed(prefix=4, infix=0).attach(language_model(shape))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(language_model(shape), config)
    theirs.prompt_encoder["default"].embedding.weight.copy_(model.virtual_tokens.embeddings)
    assert torch.allclose(theirs(input_ids=ids).logits[:, 4:], model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("shape", models.SHAPES)
@both
def test_saved_and_loaded_again_they_give_the_same_logits(kind, shape, tmp_path):
    model = attached(kind, shape)
    models.train(model, rw.SimplexAdam(kind(), model, lr=1e-2), 3)
    rw.save(model, tmp_path / "adapter", kind(prefix=PREFIX, infix=INFIX), head=models.head(shape))
    torch.manual_seed(99)
    again = rw.load(models.model(shape), tmp_path / "adapter")
    assert torch.equal(models.logits(again), models.logits(model.eval()))


@pytest.mark.parametrize("shape", ["bert", "gpt2", "t5"])
@both
def test_a_checkpoint_goes_on_bit_identically(kind, shape, tmp_path):
    def run(steps, start=0):
        model = attached(kind, shape)
        optimizer = rw.SimplexAdam(kind(), model, lr=1e-2)
        torch.manual_seed(5)
        if start:
            assert rw.load_checkpoint(tmp_path / "checkpoint", model, optimizer) == start
        losses = []
        for step in range(start, steps):
            losses += models.train(model, optimizer, 1, start=step)
            if step == 1 and not start:
                rw.save_checkpoint(tmp_path / "checkpoint", model, optimizer)
        return losses, model.state_dict()

    whole, state = run(5)
    rest, resumed = run(5, start=2)
    assert rest == whole[2:]
    assert state.keys() == resumed.keys() and all(torch.equal(state[name], resumed[name]) for name in state)


@pytest.mark.parametrize("shape", ["bert", "gpt2", "t5"])
@both
def test_in_a_trainer_with_activation_checkpointing_and_rows_without_labels(kind, shape, tmp_path):
    def trainer(**options):
        model = attached(kind, shape)
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
            report_to=[], use_cpu=True, disable_tqdm=True, seed=3, **options,
        )  # fmt: skip
        return rw.RankTrainer(
            method=kind(prefix=PREFIX, infix=INFIX), model=model, args=args, train_dataset=models.rows(),
            eval_dataset=models.rows(8, seed=1),
        )  # fmt: skip

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert whole.evaluate()["eval_loss"] > 0
    bare = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in models.rows(8, seed=1)]
    predictions = whole.predict(bare).predictions
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    assert logits.shape == (8, models.LABELS)
    saving = trainer(activation_checkpointing=True)
    before = saving.model.virtual_tokens.embeddings.detach().clone()
    saving.train()
    assert not torch.equal(saving.model.virtual_tokens.embeddings, before)


@pytest.mark.parametrize("shape", models.SHAPES)
@both
def test_bf16_trains_by_autocast_and_as_the_models_own_type(kind, shape):
    model = attached(kind, shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = models.train(model, rw.SimplexAdam(kind(), model, lr=1e-2), 3)
    assert torch.isfinite(torch.tensor(losses)).all()
    torch.manual_seed(1)
    half = kind(prefix=PREFIX, infix=INFIX).attach(models.model(shape).to(torch.bfloat16))
    assert all(p.dtype == torch.float32 for p in half.parameters() if p.requires_grad)
    losses = models.train(half, rw.SimplexAdam(kind(), half, lr=1e-2), 3)
    assert torch.isfinite(torch.tensor(losses)).all()


@both
def test_a_copy_is_on_its_own(kind):
    model = attached(kind)
    twin, before = copy.deepcopy(model), models.logits(model)
    models.train(twin, rw.SimplexAdam(kind(), twin, lr=0.1), 3)
    assert torch.equal(models.logits(model), before) and not torch.equal(models.logits(twin), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": -1}, "prefix must not be negative, not -1"),
        ({"infix": -2}, "infix must not be negative, not -2"),
        ({"prefix": 0, "infix": 0}, "prefix and infix are both 0: one of them must be 1 or more"),
        ({"suffix": 3}, "suffix"),
    ],
)
@pytest.mark.parametrize("name", ["pre-embed", "pre-layer"])
def test_bad_options_get_one_clear_line(name, options, message):
    with pytest.raises(rw.InputError, match=message) as caught:
        build({"name": name, **options})
    assert "\n" not in str(caught.value)


@both
def test_what_does_not_fit_the_model_gets_one_clear_line(kind):
    for made, model, head, message in (
        (kind(prefix=30, infix=2), models.model("gpt2"), ["score"], "32 virtual tokens leave no room in the 32 posit"),
        (kind(), models.model(), ["klassifier"], "classifier"),
        (kind(), rw.LoRA(rank=2).attach(models.model()), [], "already has an adapter"),
        (kind(), attached(kind), [], "already has virtual tokens"),
        (kind(), torch.nn.Linear(2, 2), [], "transformers model"),
    ):
        with pytest.raises(rw.InputError, match=message) as caught:
            made.attach(model, head)
        assert "\n" not in str(caught.value)
