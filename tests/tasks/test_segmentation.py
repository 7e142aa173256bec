"""Segmentation: what a network reads, what is scored, what is wrong with pictures, and runs that go on exactly."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import bootstrap
from asserts import refused
from rankwise import tasks
from rankwise.errors import InputError
from rankwise.files import claim
from rankwise.metrics.segmentation import counts, dice, dice_of
from rankwise.nets.unet import IGNORE, RefinedUNet, UNet
from rankwise.results.summary import Summary
from rankwise.runs.maker import Maker
from rankwise.runs.store import Store
from rankwise.settings import RunConfig
from rankwise.tasks.base import Evaluation
from rankwise.tasks.segmentation import _augmented
from rankwise.train.model import build
from rankwise.train.run import code_for, run
from runs import make

REAL = os.environ.get("RANKWISE_DATA")
SIZE = {"height": 64, "width": 64}


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def pair(seed: int, size: int = 64) -> tuple[bytes, bytes]:
    """A picture that is bright where its mask is 1."""
    draw = np.random.default_rng(seed)
    mask = np.zeros((size, size), int)
    top, left = draw.integers(0, size // 2, 2)
    mask[top : top + size // 2, left : left + size // 2] = 1
    return png(mask[..., None] * 150 + draw.integers(0, 100, (size, size, 3))), png(mask)


def write(folder: Path, rows: int = 12) -> dict[str, Any]:
    for name, first in (("train", 0), ("validation", 100)):
        images, masks = zip(*(pair(first + i) for i in range(rows)), strict=True)
        folder.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pa.table({"image": images, "mask": masks}), folder / f"{name}.parquet")
    return {"name": "segmentation", "dataset": str(folder), **SIZE}


def test_what_the_network_reads_is_the_picture_and_its_classes(tmp_path: Path) -> None:
    task: Any = tasks.build({**write(tmp_path / "data"), "augment": False})
    rows = list(task.encode(task.train(), None, 0))
    batch = task.collate(UNet(size=64), None, 0)(rows[:3])
    assert batch["pixel_values"].shape == (3, 3, 64, 64) and batch["labels"].shape == (3, 64, 64)
    image = np.asarray(Image.open(io.BytesIO(rows[0]["image"])))
    assert np.array_equal(batch["pixel_values"][0].movedim(0, -1).numpy() * 255, image)
    assert np.array_equal(batch["labels"][0], np.asarray(Image.open(io.BytesIO(rows[0]["mask"]))))


def test_numbers_that_are_no_class_do_not_count(tmp_path: Path) -> None:
    task: Any = tasks.build({"name": "segmentation", "dataset": "x", "names": ["a", "b", "c"]})
    assert task.classes == 3
    assert task.numbers(np.array([[0, 2, 3, 255]])).tolist() == [[0, 2, IGNORE, IGNORE]]
    two: Any = tasks.build({"name": "segmentation", "dataset": "x"})
    assert two.classes == 1 and two.numbers(np.array([[0, 1, 255, 7]])).tolist() == [[0, 1, 1, IGNORE]]


@given(st.integers(0, 10_000), st.integers(8, 40), st.integers(8, 40))
@settings(deadline=None, max_examples=40)
def test_an_augmented_picture_keeps_its_size_and_mask_and_picture_go_together(
    seed: int, height: int, width: int
) -> None:
    draw = np.random.default_rng(seed)
    mask = (np.add.outer(np.arange(height) * 2, np.arange(width)) > height).astype(np.int64)
    image = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 200
    bright, varied = _augmented(image, mask, draw)
    assert bright.shape == image.shape and varied.shape == mask.shape
    assert set(np.unique(varied)) <= set(np.unique(mask))
    agree = (bright[..., 0] > 0.35 * max(bright.max(), 1)) == (varied == 1)
    assert agree.mean() > 0.8  # but for the edge, where the picture is interpolated
    again = _augmented(image, mask, np.random.default_rng(seed))
    assert np.array_equal(again[0], bright) and np.array_equal(again[1], varied)


def test_what_is_drawn_for_a_batch_depends_on_its_rows_and_the_seed_alone(tmp_path: Path) -> None:
    task: Any = tasks.build(write(tmp_path / "data"))
    rows = list(task.encode(task.train(), None, 0))
    net = UNet(size=64)
    first = task.collate(net, None, 1)(rows[:4])["pixel_values"]
    torch.manual_seed(99)
    assert torch.equal(task.collate(net, None, 1)(rows[:4])["pixel_values"], first)
    assert not torch.equal(task.collate(net, None, 2)(rows[:4])["pixel_values"], first)
    assert not torch.equal(task.collate(net, None, 1)([*rows[:3], rows[5]])["pixel_values"][:3], first[:3])


def test_scores_are_those_of_all_pixels_together(tmp_path: Path) -> None:
    task: Any = tasks.build(write(tmp_path / "data", rows=5))
    split = task.evaluation()[0]
    torch.manual_seed(0)
    net = UNet(size=64).train()
    evaluation = Evaluation(split, task.encode(split, None, 0))
    state = torch.get_rng_state()
    one, all_at_once = (task.evaluate(net, evaluation, None, size, final=True) for size in (1, 5))
    assert torch.equal(torch.get_rng_state(), state) and net.training
    given = np.stack([np.asarray(Image.open(io.BytesIO(each))) for each in one.rows["prediction"].to_pylist()])
    truth = np.stack([np.asarray(Image.open(io.BytesIO(each))) for each in split.data["mask"]])
    assert one.metrics["dice"] == pytest.approx(dice(counts(given, truth, 1)))
    assert one.metrics["dice"] == all_at_once.metrics["dice"]
    picture = Image.open(io.BytesIO(one.files["masks.png"]))
    assert picture.size == (4 * 64, 3 * 64)
    assert not task.evaluate(net, evaluation, None, 5, final=False).files


@pytest.mark.parametrize(
    "method", ["sora", *(pytest.param(name, marks=pytest.mark.large) for name in ("full", "head", "lora"))]
)
@pytest.mark.parametrize("model", ["unet", pytest.param("unet-refined", marks=pytest.mark.large)])
def test_a_run_goes_from_pictures_to_masks(model: str, method: str, tmp_path: Path) -> None:
    options = {"rank": 2, "targets": ["bottleneck", "conv1"]} if method in ("lora", "sora") else {}
    task = write(tmp_path / "data")
    folder = make(
        tmp_path / "run", task=task, model=model, method={"name": method, **options}, max_steps=3, batch_size=4
    )
    result = run(folder)
    assert set(result["metrics"]) == {"dice", "iou"} and result["model"] == model
    assert result["parameters"]["head"] > 0 and (folder / "masks.png").is_file()
    assert len(pyarrow.parquet.read_table(folder / "predictions.parquet")) == 12
    if method == "full":  # its network is a `model:` for other runs
        net, _, _ = build(str(folder / "model"), tasks.build(task), 0)
        split = tasks.build(task).evaluation()[0]
        evaluation = Evaluation(split, tasks.build(task).encode(split, None, 0))
        scored = tasks.build(task).evaluate(net, evaluation, None, 4, final=False)
        assert {name: scored.metrics[name] for name in result["metrics"]} == result["metrics"]


@pytest.mark.large
def test_a_summary_has_an_interval_over_the_images(tmp_path: Path) -> None:
    """It is that of a bootstrap by hand, which counts the pixels of the masks that were drawn."""
    task = write(tmp_path / "data", rows=5)
    folders = []
    settings = {"task": task, "model": "unet-refined", "max_steps": 16, "batch_size": 4, "learning_rate": 1e-3}
    for method in ({"name": "full"}, {"name": "lora", "rank": 2, "targets": ["conv1"]}):
        folders.append(make(tmp_path / "runs" / method["name"], method=method, **settings))
        run(folders[-1])
    results = Store(tmp_path / "runs").results()
    tables = [pyarrow.parquet.read_table(folder / "predictions.parquet").to_pydict() for folder in folders]
    for table, result in zip(tables, results, strict=True):
        assert float(dice_of(np.array(table["statistics"]).sum(axis=0))) == result.metrics["dice"]
    given = [np.stack([np.asarray(Image.open(io.BytesIO(each))) for each in t["prediction"]]) for t in tables]
    stored = tasks.build(task).evaluation()[0].data["mask"]
    truth = np.stack([np.asarray(Image.open(io.BytesIO(each))) for each in stored])
    with bootstrap.few():
        by_hand = bootstrap.by_hand(lambda masks, labels: dice(counts(masks, labels, 1)), given[:1], given[1:], truth)
        (contrast,) = Summary(results).contrasts
    assert contrast.ours.method == "full" and contrast.gap.examples == pytest.approx(by_hand)
    assert by_hand[0] < by_hand[1]


@pytest.mark.large
def test_a_network_trained_on_one_set_is_adapted_to_another(tmp_path: Path) -> None:
    """A chain from full fine-tuning to LoRA: the second run begins with the function that the first one ended with."""
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    settings = {"model": "unet", "batch_size": 4, "max_steps": 4, "learning_rate": 1e-2}
    before = make(tmp_path / "runs" / "first", task=first, method={"name": "full"}, followed=True, **settings)
    run(before)
    digest = Store(tmp_path / "runs").config(before).id
    lora = {"name": "lora", "rank": 2, "targets": ["bottleneck"]}
    settings |= {"max_steps": 1, "learning_rate": 1e-12, "after": digest}
    after = make(tmp_path / "runs" / "second", task=second, method=lora, **settings)
    result = run(after)
    trained, _, _ = build("unet", tasks.build(second), 0)
    state = torch.load(before / "weights.pt", weights_only=True)
    trained.load_state_dict(state)
    task: Any = tasks.build(second)
    split = task.evaluation()[0]
    scored = task.evaluate(trained, Evaluation(split, task.encode(split, None, 0)), None, 4, final=False)
    assert result["metrics"]["dice"] == pytest.approx(scored.metrics["dice"], abs=1e-3)


def test_a_saved_network_is_a_model_to_begin_with(tmp_path: Path) -> None:
    task = tasks.build(write(tmp_path / "data"))
    for kind in (UNet, RefinedUNet):
        net = kind(size=64)
        net.save_pretrained(tmp_path / kind.__name__)
        loaded, processor, head = build(str(tmp_path / kind.__name__), task, 0)
        assert type(loaded) is kind and processor is None and head == ["classifier"]
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), loaded.parameters(), strict=True))
    UNet(size=64, classes=5).save_pretrained(tmp_path / "five")
    for name, message in (
        ("five", "has 5 outputs per pixel"),
        ("none", "is no folder with a saved network; give one, or one of unet, unet-refined"),
    ):
        with pytest.raises(InputError, match=message):
            build(str(tmp_path / name), task, 0)


# --- pictures in folders, and what is wrong with them -----------------------------------------------------------------


def folders(root: Path) -> Path:
    for split in ("train", "validation"):
        for part, content in zip(("images", "masks"), pair(3), strict=True):
            (root / split / part).mkdir(parents=True)
            for name in ("one", "two"):
                (root / split / part / f"{name}.png").write_bytes(content)
    return root


def unread(dataset: Path) -> str:
    task: Any = tasks.build({"name": "segmentation", "dataset": str(dataset), **SIZE})
    return refused(lambda: task.encode(task.train(), None, 0))


def test_folders_of_pictures(tmp_path: Path) -> None:
    root = folders(tmp_path)
    task: Any = tasks.build({"name": "segmentation", "dataset": str(root), **SIZE})
    assert len(task.train().data) == len(task.evaluation()[0].data) == 2
    image = root / "train" / "images" / "two.png"
    mask = root / "train" / "masks" / "two.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:100])
    assert str(image) in unread(root) and "the image cannot be read" in unread(root)
    image.write_bytes(whole)
    mask.write_bytes(pair(3, 32)[1])
    assert f"{image}: the image has 64×64 pixels and its mask 32×32: make them equal" in unread(root)
    mask.write_bytes(whole)
    assert "the mask has colours (RGB)" in unread(root)
    mask.unlink()
    assert f"{image} has no mask: put one called two.png" in unread(root)


def test_damaged_rows_of_a_file_are_named(tmp_path: Path) -> None:
    write(tmp_path / "data")
    file = tmp_path / "data" / "train.parquet"
    image, mask = pair(1)
    pyarrow.parquet.write_table(pa.table({"image": [image, image], "mask": [mask, b"no picture"]}), file)
    assert f"{file}, row 1: the mask cannot be read" in unread(tmp_path / "data")


@pytest.mark.skipif(not REAL or not (Path(REAL) / "segmentation").is_dir(), reason="RANKWISE_DATA has no segmentation")
def test_the_real_films() -> None:
    day, dusk = tasks.build("camvid-day"), tasks.build("camvid-dusk")
    assert [len(split.data) for split in (day.train(), *day.evaluation())] == [305, 101]
    assert [len(split.data) for split in (dusk.train(), *dusk.evaluation())] == [62, 62]
    whole: Any = tasks.build("camvid")
    train = whole.train()
    assert len(train.data) == 367 and whole.classes == 11 and not train.official
    few = train.data.select(range(2))
    rows = list(whole.encode(type(train)("train", few, False), None, 0))
    labels = whole.collate(UNet(classes=11, size=(192, 256)), None, 0)(rows)["labels"]
    assert labels.shape == (2, 192, 256) and set(labels.unique().tolist()) <= {IGNORE, *range(11)}
    assert json.dumps(whole.revision())


@pytest.mark.large
def test_a_chain_goes_over_two_tasks_in_one_sweep(tmp_path: Path) -> None:
    """As a sweep makes its folders: each with the revision of its own data, which differ."""
    first, second = write(tmp_path / "a"), write(tmp_path / "b", rows=10)
    store = Store(tmp_path / "runs")
    settings: dict[str, Any] = {"model": "unet", "batch_size": 4, "max_steps": 2, "runs": str(tmp_path / "runs")}
    before = RunConfig(task=first, method="full", followed=True, **settings)
    lora = {"name": "lora", "rank": 2, "targets": ["bottleneck"]}
    after = RunConfig(task=second, method=lora, after=before.id, **settings)
    folders = [store.create(config, tasks.build(config.task).revision()) for config in (before, after)]
    assert store.before(folders[1]) == folders[0]
    assert [run(folder)["method"] for folder in folders] == ["full", "lora"]
    assert [len(result.lineage) for result in store.results(folders)] == [0, 1]


def test_data_that_changed_since_the_run_was_begun_is_noticed(tmp_path: Path) -> None:
    task = write(tmp_path / "data")
    config = RunConfig(task=task, method="head", batch_size=4, max_steps=1, runs=str(tmp_path / "runs"))
    made = Maker.now(tasks.build(task).revision(), code_for(config))
    folder = Store(tmp_path / "runs").create(config, made)
    claim(folder, "checkpoint-1")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "complete.json").write_text("{}")
    write(tmp_path / "data", rows=11)
    with pytest.raises(InputError, match="was started with other data; .*--reuse.*--repeat"):
        run(folder)


def test_pictures_of_sixteen_bits_and_empty_masks_are_unread(tmp_path: Path) -> None:
    file = tmp_path / "data" / "train.parquet"
    write(tmp_path / "data")
    image, mask = pair(1)
    out = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)).save(out, "PNG")
    for row, message in (
        ((out.getvalue(), mask), "more than 8 bits"),
        ((image, png(np.full((64, 64), 128))), "no pixel"),
    ):
        pyarrow.parquet.write_table(pa.table({"image": [row[0]], "mask": [row[1]]}), file)
        assert f"{file}, row 0" in unread(tmp_path / "data") and message in unread(tmp_path / "data")
