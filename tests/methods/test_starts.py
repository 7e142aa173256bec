"""How factors start: SVD starts of LoRA and LoRA-FA, PiSSA and DoRA; with export, resume and the pull to the start."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import T5Config, T5ForConditionalGeneration, TrainingArguments, default_data_collator
from transformers.pytorch_utils import Conv1D

import models
import rankwise as rw
import stock_peft
from methods import by_turns, one_shape
from rankwise.methods import build
from rankwise.ranks import sites
from rankwise.ranks.kept import start_of

RESIDUAL = ("svd_residual", "pissa")
INITS = ("kaiming", "normal", "svd", "svd_residual", "svd_authors", "pissa")
every_shape = pytest.mark.parametrize("shape", models.SHAPES)
PARTS = {"targets": ["c_attn.q", "c_attn.v"], "rank": 2, "alpha": 4.0}  # of GPT-2's fused projection
every_kind = pytest.mark.parametrize("kind", ["lora", "lora-fa"])
every_init = pytest.mark.parametrize("init", INITS)


def made(kind="lora", init="kaiming", **more):
    return build({"name": kind, "rank": 2, "alpha": 4.0, "init": init, **more})


def attached(method, shape="bert", seed=1):
    torch.manual_seed(seed)
    return method.attach(models.model(shape), head=models.head(shape))


def stepper(method, model, lr=1e-2, **more):
    return rw.SimplexAdam(method, model, lr=lr, **more)


def base_weights(shape):
    linear = (torch.nn.Linear, Conv1D)
    named = models.model(shape).named_modules()
    return {n: m.weight.T if isinstance(m, linear[1]) else m.weight for n, m in named if isinstance(m, linear)}


# --- what each start is ----------------------------------------------------------------------------------------------


@every_shape
@every_kind
def test_svd_is_the_best_of_its_rank_beside_an_untouched_W(kind, shape):
    model, W = attached(made(kind, "svd"), shape), base_weights(shape)
    for site in sites(model):
        assert torch.equal(site.W, W[site.name])
        least = torch.linalg.svdvals(W[site.name])[2:].norm()
        assert torch.isclose((site.W - site.B @ site.A).norm(), least, rtol=1e-4)


@every_shape
@every_kind
@pytest.mark.parametrize("init", RESIDUAL)
def test_a_residual_start_keeps_the_function(kind, init, shape):
    model, W = attached(made(kind, init), shape), base_weights(shape)
    assert torch.allclose(models.logits(model), models.logits(models.model(shape)), atol=1e-5)
    for site in sites(model):
        product = site.scaling * (site.B @ site.A)
        assert product.norm() > 0.01
        assert torch.allclose(site.W + product, W[site.name], atol=1e-6)
        # svd: the root of the truncation of W is in each factor; pissa: s B A is that truncation
        best = torch.linalg.svdvals(W[site.name])[:2] * (site.scaling if init == "svd_residual" else 1.0)
        assert torch.allclose(torch.linalg.svdvals(product)[:2], best, rtol=1e-4)


@every_shape
@every_kind
def test_the_authors_start_reads_columns_for_rows(kind, shape):
    model, W = attached(made(kind, "svd_authors"), shape), base_weights(shape)
    for site in sites(model):
        assert torch.equal(site.W, W[site.name])
        U, S, Vt = torch.linalg.svd(W[site.name])
        assert torch.allclose(site.A, S[:2].sqrt()[:, None] * Vt[:, :2].T, atol=1e-6)
        assert torch.allclose(site.B, U[:, :2] * S[:2].sqrt(), atol=1e-6)


@every_init
@every_kind
@every_shape
def test_a_method_that_calls_its_start_exact_changes_no_bit(kind, init, shape):
    method = made(kind, init)
    same = torch.equal(models.logits(attached(method, shape)), models.logits(models.model(shape)))
    assert method.exact_start == (init in ("kaiming", "normal"))
    assert same or not method.exact_start


@every_shape
def test_dora_starts_exactly_and_its_magnitude_is_the_norm_of_W(shape):
    method = build({"name": "dora", "rank": 2})
    model, W = attached(method, shape), base_weights(shape)
    assert method.exact_start and torch.equal(models.logits(model), models.logits(models.model(shape)))
    for site in sites(model):
        magnitude = site.layer.lora_magnitude_vector["default"].weight
        assert magnitude.requires_grad and torch.allclose(magnitude, W[site.name].norm(dim=1), atol=1e-6)


@pytest.mark.parametrize("init", ["svd", "svd_residual", "svd_authors", "pissa"])
@every_kind
@every_shape
def test_on_the_meta_device_the_counts_are_those_of_lora(kind, init, shape):
    def count(method):
        with torch.device("meta"):
            model = method.attach(models.model(shape), head=models.head(shape))
        assert all(p.is_meta for p in model.parameters())
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert count(made(kind, init)) == count(made(kind))


def test_pissa_the_method_is_lora_with_that_start():
    a, b = attached(build({"name": "pissa", "rank": 2, "alpha": 4.0})), attached(made("lora", "pissa"))
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's own word of warning
@pytest.mark.parametrize("init", RESIDUAL)
def test_a_tied_weight_takes_no_residual_start(init):
    """W ← W - s B A would change the embedding too."""
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    base = T5ForConditionalGeneration(config)
    assert base.lm_head.weight is base.shared.weight
    with pytest.raises(rw.InputError, match="lm_head shares its weight"):
        made("lora", init, targets="all-linear+lm_head").attach(base)


# --- trained, saved, loaded by stock PEFT ----------------------------------------------------------------------------


@pytest.mark.large
@one_shape
def test_stock_peft_on_the_untouched_base_gives_the_trained_logits(shape, tmp_path):
    methods = {f"{kind}-{init}": made(kind, init) for kind in ("lora", "lora-fa") for init in INITS}
    methods["dora"] = build({"name": "dora", "rank": 2})
    expected = {}
    for name, method in methods.items():
        model = attached(method, shape)
        models.train(model, stepper(method, model), 3)
        before = models.logits(model)
        rw.save(model, tmp_path / name)
        assert torch.equal(models.logits(model), before)
        assert (before - models.logits(attached(method, shape))).abs().max() > 1e-3  # it did learn something
        expected[tmp_path / name] = before
    stock_peft.agrees(models.model(shape), models.batch(), expected, tmp_path)


@every_kind
@pytest.mark.parametrize("init", RESIDUAL)
def test_a_residual_start_is_saved_at_twice_the_rank_and_the_others_at_their_own(kind, init, tmp_path):
    for given, rank in ((init, 4), ("svd", 2)):
        method = made(kind, given)
        rw.save(attached(method), tmp_path / given)
        assert {site.rank for site in sites(rw.load(models.model(), tmp_path / given))} == {rank}


@pytest.mark.parametrize("name", ["lora", "lora-fa", "dora"])
@every_init
def test_on_parts_of_a_fused_projection_starts_export_and_resume_too(name, init, tmp_path):
    method = build({"name": name, "init": init, "pull": 0.05, **PARTS})
    fresh = models.logits(models.model("gpt2"))
    if init not in ("svd", "svd_authors"):
        assert torch.allclose(models.logits(attached(method, "gpt2")), fresh, atol=1e-5)
    whole, model = in_a_bare_loop(method, "gpt2", 5, seed=1, save=tmp_path / "checkpoint", cut=2)
    rest, again = in_a_bare_loop(method, "gpt2", 5, seed=2, resume=tmp_path / "checkpoint")
    assert rest == whole[2:] and same_state(model, again)
    assert {site.name.rpartition(".")[2] for site in sites(model)} == {"q", "v"}
    rw.save(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(models.model("gpt2"), str(tmp_path / "adapter")).eval()
    assert (models.logits(loaded) - fresh).abs().max() > 1e-3
    assert torch.allclose(models.logits(loaded), models.logits(model), atol=1e-5)


# --- cut and resumed -------------------------------------------------------------------------------------------------


def in_a_bare_loop(method, shape, steps, seed, resume=None, save=None, cut=0):
    model = attached(method, shape, seed)
    optimizer = stepper(method, model)
    torch.manual_seed(5)
    begun = rw.load_checkpoint(resume, model, optimizer) if resume else 0
    losses = []
    for step in range(begun, steps):
        losses += models.train(model, optimizer, 1, start=step)
        if step + 1 == cut:
            rw.save_checkpoint(save, model, optimizer)
    return losses, model


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


RESUMED = [(kind, init) for kind in ("lora", "lora-fa") for init in INITS] + [("dora", "kaiming")]
SOME = [("lora", "svd_residual"), ("lora", "pissa"), ("lora-fa", "svd"), ("dora", "kaiming")]


@pytest.mark.parametrize(
    ("kind", "init", "shape"),
    [(*one, "gpt2") for one in RESUMED]
    + [
        pytest.param(*one, shape, marks=pytest.mark.large) for one in SOME for shape in models.SHAPES if shape != "gpt2"
    ],
)
def test_a_bare_loop_resumes_bit_identically(kind, init, shape, tmp_path):
    """Another seed at the second attach: what was drawn must come from the checkpoint."""
    method = made(kind, init, pull=0.05, dropout=0.1)
    whole, model = in_a_bare_loop(method, shape, 5, seed=1, save=tmp_path / "checkpoint", cut=2)
    rest, again = in_a_bare_loop(method, shape, 5, seed=2, resume=tmp_path / "checkpoint")
    assert rest == whole[2:] and same_state(model, again)


def in_a_trainer(method, shape, folder, seed, resume=None):
    model = attached(method, shape, seed)
    args = TrainingArguments(
        str(folder), max_steps=5, per_device_train_batch_size=8, learning_rate=1e-2, warmup_steps=1, seed=3,
        save_strategy="steps", save_steps=1, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    data = {"train_dataset": models.rows(), "data_collator": default_data_collator}
    trainer = rw.RankTrainer(method=method, model=model, args=args, **data)
    trainer.train(resume_from_checkpoint=resume)
    return [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log], model


@pytest.mark.parametrize(
    ("kind", "init"), [one if one in SOME else pytest.param(*one, marks=pytest.mark.large) for one in RESUMED]
)
def test_a_trainer_resumes_bit_identically(kind, init, tmp_path):
    method = made(kind, init, pull=0.05, dropout=0.1)
    whole, model = in_a_trainer(method, "gpt2", tmp_path, seed=1)
    rest, again = in_a_trainer(method, "gpt2", tmp_path / "again", seed=2, resume=str(tmp_path / "checkpoint-2"))
    assert rest[-3:] == whole[-3:] and same_state(model, again)


@by_turns("init", INITS, ["bert", "gpt2", "t5"])
def test_a_checkpoint_of_one_start_fits_a_model_with_another(init, shape, tmp_path):
    """The checkpoint says how its model started, and W follows, whatever the model at hand did to its own W."""
    given = made("lora", init)
    _, model = in_a_bare_loop(given, shape, 3, seed=1, save=tmp_path / "checkpoint", cut=3)
    for other in INITS:
        taking = made("lora", other)
        again = attached(taking, shape, seed=2)
        optimizer = stepper(taking, again)
        assert rw.load_checkpoint(tmp_path / "checkpoint", again, optimizer) == 3
        assert torch.allclose(models.logits(again), models.logits(model), atol=1e-5), other
        assert (start_of(sites(again)[0]) is None) == (init not in RESIDUAL), other
        assert not torch.isnan(torch.tensor(models.train(again, optimizer, 1, start=3))).any()
        rw.save(again, tmp_path / "adapter")
        loaded = rw.load(models.model(shape), tmp_path / "adapter")
        assert torch.allclose(models.logits(loaded), models.logits(again), atol=1e-5), other


# --- pull: α_reg ‖B - B0‖²_F -----------------------------------------------------------------------------------------


@every_init
@every_kind
def test_the_pull_is_the_gradient_of_its_term(kind, init):
    method = made(kind, init, pull=0.3)
    model = attached(method)
    begun = {site.name: site.B.detach().clone() for site in sites(model)}
    models.train(model, stepper(method, model), 3)
    model(**models.batch()).loss.backward()
    for site in sites(model):  # the loss's gradient is set aside, to see the other alone
        site.B.grad.zero_()
    method.before_step(model)
    found = {site.name: site.B.grad.clone() for site in sites(model)}
    model.zero_grad()
    sum(0.3 * (site.B - begun[site.name]).square().sum() for site in sites(model)).backward()
    for site in sites(model):
        assert site.B.grad.abs().max() > 0
        assert torch.allclose(found[site.name], site.B.grad, atol=1e-7)


@every_init
def test_with_gradient_accumulation_the_pull_counts_once(init):
    method = made("lora", init, pull=0.3)
    model = attached(method)
    begun = {site.name: site.B.detach().clone() for site in sites(model)}
    optimizer = stepper(method, model)
    models.train(model, optimizer, 2)
    for seed in range(3):
        (model(**models.batch(seed=seed)).loss / 3).backward()
    before = {site.name: site.B.grad.clone() for site in sites(model)}
    away = {site.name: site.B.detach() - begun[site.name] for site in sites(model)}
    optimizer.step()
    for site in sites(model):
        assert torch.allclose(site.B.grad - before[site.name], 0.6 * away[site.name], atol=1e-7)
        assert away[site.name].abs().max() > 0


@pytest.mark.parametrize("init", ["kaiming", "svd", "svd_residual"])
def test_a_strong_pull_holds_B_at_its_start(init):
    def away(pull):
        method = made("lora", init, pull=pull)
        model = attached(method)
        begun = [site.B.detach().clone() for site in sites(model)]
        optimizer = stepper(method, model, lr=1e-3)
        models.train(model, optimizer, 20)
        return sum((site.B - B0).square().sum().item() for site, B0 in zip(sites(model), begun, strict=True))

    assert away(100.0) < 0.5 * away(0.0)


def test_without_a_pull_nothing_is_remembered_but_what_was_taken_out_of_W():
    for init in INITS:
        for pull in (0.0, 0.1):
            begun = start_of(sites(attached(made("lora", init, pull=pull)))[0])
            remembered = init in RESIDUAL or (pull > 0 and init not in ("kaiming", "normal"))
            assert (begun is not None) == remembered
            assert begun is None or (begun.A is not None) == (init in RESIDUAL)


def test_bad_options_get_one_clear_line():
    for options, message in (
        ({"name": "lora", "pull": -0.1}, "pull must not be negative"),
        ({"name": "lora-fa", "init": "svdd"}, "init must be one of kaiming"),
        ({"name": "simplex-lora", "init": "svd"}, "init must be kaiming or normal"),
    ):
        with pytest.raises(rw.InputError, match=message) as caught:
            build(options)
        assert "\n" not in str(caught.value)


# --- what others write and load --------------------------------------------------------------------------------------


def test_what_peft_writes_of_a_residual_start_is_loud_and_of_pissa_right(tmp_path):
    for name, init in (("lora", "svd_residual"), ("lora-fa", "svd_residual"), ("pissa", "pissa")):
        method = build({"name": name, "rank": 2, **({} if name == "pissa" else {"init": init})})
        model = attached(method)
        models.train(model, stepper(method, model), 3)
        model.save_pretrained(tmp_path / name / init)
        with pytest.raises(rw.InputError, match="holds the state of a training"):
            rw.load(models.model(), tmp_path / name / init)
        if init == "pissa":
            again = PeftModel.from_pretrained(models.model(), tmp_path / name / init)
            assert torch.allclose(models.logits(again), models.logits(model), atol=1e-5)
        else:
            with pytest.raises(ValueError, match="not a finished adapter"):
                PeftModel.from_pretrained(models.model(), tmp_path / name / init)


def test_an_adapter_beside_a_residual_start_is_not_saved_as_one_of_the_pretrained_weights(tmp_path):
    model = attached(made("lora", "svd_residual"))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))
    rw.save(model, tmp_path / "first")
    model.set_adapter("second")
    with pytest.raises(rw.InputError, match="'default' has a residual start"):
        rw.save(model, tmp_path / "second")
