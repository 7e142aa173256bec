import copy
import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import Trainer, TrainingArguments

import rankwise as rw
from rankwise.nets.unet import IGNORE, RefinedUNet, UNet, dice_loss, masks
from rankwise.ranks import ranks, sites

# The first width of the refined network holds 2×2 pixels of three colours.
WIDTHS = {UNet: (4, 8), RefinedUNet: (12, 16)}


def small(kind, classes=1, seed=0):
    torch.manual_seed(seed)
    return kind(WIDTHS[kind], classes, size=(16, 24))


both = pytest.mark.parametrize("kind", [UNet, RefinedUNet])


def shapes(rows=8, classes=1, size=(16, 24), seed=0):
    """Images of a bright rectangle on a dark ground, and its mask; with more classes its colour says which it is."""
    draw = np.random.default_rng(seed)
    images, labels = 0.2 * draw.random((rows, 3, *size), dtype=np.float32), np.zeros((rows, *size), dtype=np.int64)
    for image, label in zip(images, labels, strict=True):
        y, x = draw.integers(0, size[0] // 2), draw.integers(0, size[1] // 2)
        place = np.s_[y : y + size[0] // 2, x : x + size[1] // 2]
        kind = draw.integers(1, max(classes, 2))
        image[kind % 3][place] += 0.8
        label[place] = kind
    return {"pixel_values": torch.from_numpy(images), "labels": torch.from_numpy(labels)}


def learn(model, steps, rate=1e-2, classes=1):
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    losses = []
    for step in range(steps):
        loss = model.train()(**shapes(classes=classes, seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# --- the networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "count", "features"),
    [
        ({}, 1_500_269, 1024),
        ({"widths": (4, 8, 16, 32, 32)}, 4_309_261, 2048),
        ({"size": (192, 256)}, 1_500_269 - 1024 * 1025 + 768 * 769, 768),
        ({"classes": 11}, 1_500_269 + 10 * 5, 1024),
    ],
)
def test_the_reports_networks_have_its_parameters(options, count, features):
    with torch.device("meta"):
        model = UNet(**options)
    assert parameters(model) == count
    assert (model.bottleneck.in_features, model.bottleneck.out_features) == (features, features)


def by_hand(state, x, widths):
    """The report's network written down once more, from its weights, in evaluation."""

    def block(x, name):
        for i in (1, 2):
            x = functional.conv2d(x, state[f"{name}.conv{i}.weight"], padding=1)
            norm = [state[f"{name}.norm{i}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
            x = functional.batch_norm(x, *norm).relu()
        return x

    skips = []
    for level in range(len(widths)):
        skips.append(block(x, f"down.{level}"))
        x = functional.max_pool2d(skips[-1], 2)
    flat = functional.linear(x.reshape(len(x), -1), state["bottleneck.weight"], state["bottleneck.bias"]).relu()
    x = flat.reshape(x.shape)
    for level in range(len(widths)):
        x = functional.conv_transpose2d(x, state[f"up.{level}.up.weight"], state[f"up.{level}.up.bias"], stride=2)
        x = block(torch.cat([x, skips.pop()], dim=1), f"up.{level}.block")
    return functional.conv2d(x, state["classifier.weight"], state["classifier.bias"])


def test_the_reports_network_computes_what_the_report_says():
    model = small(UNet)
    learn(model, 2)
    images = shapes()["pixel_values"]
    with torch.no_grad():
        assert torch.allclose(model.eval()(images).logits, by_hand(model.state_dict(), images, (4, 8)), atol=1e-6)


@both
@pytest.mark.parametrize("classes", [1, 5])
def test_logits_have_a_channel_per_class_and_the_size_of_the_image(kind, classes):
    model = small(kind, classes)
    out = model(torch.rand(3, 3, 16, 24))
    assert out.logits.shape == (3, classes, 16, 24) and out.loss is None
    assert masks(out.logits).shape == (3, 16, 24) and masks(out.logits).max() < max(classes, 2)
    out = model(torch.rand(1, 3, 16, 24), labels=torch.zeros(1, 16, 24, dtype=torch.long))
    assert out.loss.shape == ()


@both
def test_every_pixel_sees_the_whole_image(kind):
    model = small(kind)
    learn(model, 5)
    images = shapes(rows=1)["pixel_values"]
    images.requires_grad_(True)
    model.eval()(images).logits[0, 0, 0, 0].backward()
    assert (images.grad[0, :, -4:, -4:] != 0).any()


@both
def test_all_parameters_learn(kind):
    model = small(kind, classes=3)
    model(**shapes(classes=3)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@both
@pytest.mark.parametrize("classes", [1, 3])
def test_both_learn_rectangles(kind, classes):
    model = small(kind, classes)
    losses = learn(model, 80, rate=2e-2, classes=classes)
    assert losses[-1] < 0.15 < losses[0]
    unseen = shapes(rows=16, classes=classes, seed=1000)
    with torch.no_grad():
        found = masks(model.eval()(unseen["pixel_values"]).logits)
    assert (found == unseen["labels"]).float().mean() > 0.95


def test_the_refined_network_takes_any_size_that_its_halvings_divide():
    model = small(RefinedUNet)
    assert model(torch.rand(1, 3, 40, 8)).logits.shape == (1, 1, 40, 8)
    with pytest.raises(rw.InputError, match="images of 20×24 .* multiples of 8"):
        model(torch.rand(1, 3, 20, 24))


def test_the_reports_network_takes_the_size_it_is_made_for():
    with pytest.raises(rw.InputError, match="takes images of 16×24 .*, not 24×16: resize them"):
        small(UNet)(torch.rand(1, 3, 24, 16))


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 100}, "images of 100×100 .* multiples of"),
        ({"size": (256, 200)}, "images of 256×200 .* multiples of"),
        ({"size": 0}, "images of 0×0"),
        ({"widths": ()}, "with at least one width"),
        ({"widths": (4, 0)}, "numbers above 0"),
        ({"classes": 0}, "numbers above 0"),
    ],
)
def test_networks_that_cannot_be_are_refused_in_one_line(kind, options, message):
    with pytest.raises(rw.InputError, match=message) as caught:
        kind(**options)
    assert "\n" not in str(caught.value)


@both
@pytest.mark.parametrize("shape", [(3, 16, 24), (1, 1, 16, 24), (1, 16, 24, 3)])
def test_images_that_are_no_images_are_refused(kind, shape):
    with pytest.raises(rw.InputError, match="images must be of shape"):
        small(kind)(torch.rand(shape))


# --- the loss --------------------------------------------------------------------------------------------------------


@st.composite
def batches(draw):
    """(logits, labels) with pixels that do not count."""
    n, classes, h, w = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)))
    logits = draw(arrays(np.float64, (n, classes, h, w), elements=st.floats(-8, 8)))
    known = st.integers(0, max(classes, 2) - 1)
    labels = draw(arrays(np.int64, (n, h, w), elements=st.one_of(known, st.just(IGNORE))))
    return torch.from_numpy(logits), torch.from_numpy(labels)


def loss_by_hand(logits, labels):
    logits, labels = logits.numpy(), labels.numpy()
    n, classes, h, w = logits.shape
    losses = []
    for c in range(classes):
        both = size = 0.0
        there = False
        for i, y, x in np.ndindex(n, h, w):
            if labels[i, y, x] == IGNORE:
                continue
            one = logits[i, :, y, x]
            p = 1 / (1 + np.exp(-one[0])) if classes == 1 else np.exp(one[c]) / np.exp(one).sum()
            t = labels[i, y, x] == (1 if classes == 1 else c)
            there |= t
            both += p * t
            size += p + t
        if there or classes == 1:
            losses.append(1 - (2 * both + 1) / (size + 1))
    return np.mean(losses) if losses else 0.0


@settings(deadline=None)
@given(batches())
def test_the_loss_is_one_minus_soft_dice_over_pixels_that_count_and_classes_that_occur(batch):
    assert dice_loss(*batch).item() == pytest.approx(loss_by_hand(*batch))


@settings(deadline=None)
@given(batches())
def test_pixels_to_ignore_have_no_gradient_and_the_loss_stays_within_0_and_1(batch):
    logits, labels = batch
    logits.requires_grad_(True)
    loss = dice_loss(logits, labels)
    loss.backward()
    assert 0 <= loss.item() <= 1 and logits.grad.isfinite().all()
    assert not logits.grad.movedim(1, -1)[labels == IGNORE].any()


@settings(deadline=None)
@given(batches())
def test_a_sure_and_right_prediction_has_no_loss(batch):
    logits, labels = batch
    right = labels.clamp(min=0)
    sure = 200.0 * right[:, None] - 100 if logits.shape[1] == 1 else 100.0 * functional.one_hot(right, logits.shape[1])
    sure = sure if logits.shape[1] == 1 else sure.movedim(-1, 1)
    assert dice_loss(sure, labels).item() == pytest.approx(0, abs=1e-5)
    assert torch.equal(masks(sure), right)


def test_half_precision_logits_get_a_loss_in_fp32():
    logits = torch.zeros(1, 1, 300, 300, dtype=torch.bfloat16)
    loss = dice_loss(logits, torch.ones(1, 300, 300, dtype=torch.long))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(1 / 3, abs=1e-4)


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (1, torch.full((1, 2, 2), 255), "labels go from 255 to 255; they must be 0 to 1, or -100"),
        (3, torch.full((1, 2, 2), 3), "must be 0 to 2"),
        (3, torch.full((1, 2, 2), -1), "labels go from -1"),
        (3, torch.zeros(1, 3, 2), r"labels of shape \(1, 3, 2\) do not fit"),
        (3, torch.zeros(1, 3, 2, 2), "do not fit"),
    ],
)
def test_labels_that_do_not_fit_are_refused_in_one_line(classes, labels, message):
    with pytest.raises(rw.InputError, match=message) as caught:
        dice_loss(torch.zeros(1, classes, 2, 2), labels.long())
    assert "\n" not in str(caught.value)


# --- files, copies, PEFT, the Trainer --------------------------------------------------------------------------------


@both
def test_a_saved_network_is_the_same_network(kind, tmp_path, capsys):
    model = small(kind, classes=3)
    learn(model, 3, classes=3)
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    images = shapes()["pixel_values"]
    assert not again.training and capsys.readouterr().out == ""
    with torch.no_grad():
        assert torch.equal(again(images).logits, model.eval()(images).logits)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "widths": list(WIDTHS[kind]),
        "size": [16, 24],
        "classes": 3,
    }
    assert all(torch.equal(load_file(tmp_path / "model.safetensors")[k], v) for k, v in model.state_dict().items())


@both
def test_files_that_do_not_fit_are_refused(kind, tmp_path):
    small(kind).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "bottleneck.weight"
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=name):
        kind.from_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"widths": [4, 4], "size": [16, 24]}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        kind.from_pretrained(tmp_path)


@both
def test_copies_are_networks_of_their_own(kind):
    model = small(kind).eval()
    images = shapes()["pixel_values"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._hub_mixin_config == model._hub_mixin_config
        with torch.no_grad():
            assert torch.equal(twin(images).logits, model(images).logits)
            twin.classifier.bias.add_(1)
            assert not torch.equal(twin(images).logits, model(images).logits)


@both
def test_stock_peft_adapts_the_bottleneck_and_convolutions_and_finds_its_adapter_again(kind, tmp_path):
    images = shapes()["pixel_values"]
    config = LoraConfig(r=2, target_modules=["bottleneck", "down.1.conv1"], modules_to_save=["classifier"])
    model = get_peft_model(small(kind), config)
    learn(model, 3)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(images).logits
        again = PeftModel.from_pretrained(small(kind), str(tmp_path)).eval()
        assert not torch.equal(logits, small(kind).eval()(images).logits)
        assert torch.equal(again(images).logits, logits)
        assert torch.allclose(copy.deepcopy(again).merge_and_unload()(images).logits, logits, atol=1e-5)


@both
def test_batch_norms_learn_statistics_unless_they_are_frozen(kind):
    model = small(kind)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    learn(rw.LoRA(rank=2).attach(model, head=["classifier"]), 2)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    free = small(kind)
    learn(free, 2)
    assert not any(torch.equal(buffer, before[name]) for name, buffer in free.named_buffers())
    trained = get_peft_model(small(kind), LoraConfig(r=2, target_modules=["bottleneck"], modules_to_save=["norm1"]))
    learn(trained, 2)
    moved = {name.split(".")[-4] for name, buffer in trained.named_buffers() if "running_mean" in name and buffer.any()}
    assert moved == {"norm1"}


@both
def test_methods_find_the_bottleneck_and_its_ranks(kind):
    torch.manual_seed(0)
    full = {"size": 64, "widths": (4, 8, 16, 32, 64, 64)} if kind is UNet else {"size": 64}
    method = rw.SoRA(rank=40, targets=["bottleneck"])
    model = method.attach(kind(**full), head=["classifier"])
    assert list(ranks(model)) == ["bottleneck"] and ranks(model)["bottleneck"] == 40
    trained = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"bottleneck", "classifier"}
    assert [s.name for s in sites(rw.LoRA(rank=2).attach(small(kind), head=["classifier"]))] == ["bottleneck"]


@pytest.mark.parametrize("kind", [UNet, pytest.param(RefinedUNet, marks=pytest.mark.large)])
def test_a_trainer_trains_and_scores_it(kind, tmp_path):
    from rankwise.metrics.segmentation import counts, dice

    pytest.importorskip("torchmetrics", reason="torchmetrics comes with the extra vision")
    whole = shapes(rows=32, classes=3)
    rows = [{name: value[i] for name, value in whole.items()} for i in range(32)]
    model = small(kind, classes=3)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            num_train_epochs=30,
            per_device_train_batch_size=8,
            learning_rate=2e-2,
            report_to=[],
            logging_steps=4,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            weight_decay=0.0,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        preprocess_logits_for_metrics=lambda logits, labels: masks(logits),
        compute_metrics=lambda out: {"dice": dice(counts(out.predictions, out.label_ids, 3))},
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_dice"] > 0.6


# --- real images -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif("RANKWISE_DATA" not in os.environ, reason="RANKWISE_DATA names no folder of data sets")
@both
def test_real_images_are_learnt(kind):
    pq = pytest.importorskip("pyarrow.parquet")
    pil = pytest.importorskip("PIL.Image")
    path = Path(os.environ["RANKWISE_DATA"]) / "segmentation" / "camvid" / "train.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    table = pq.read_table(path).slice(0, 4)
    images, labels = (
        np.stack([np.asarray(pil.open(io.BytesIO(data)))[::4, ::4] for data in table[column].to_pylist()])
        for column in ("image", "mask")
    )
    batch = {
        "pixel_values": torch.from_numpy(images).permute(0, 3, 1, 2) / 255,
        "labels": torch.from_numpy(np.where(labels == 11, IGNORE, labels.astype(np.int64))),
    }
    torch.manual_seed(0)
    model = kind(widths=(8, 16, 32), classes=11, size=(48, 64))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
