"""The family of tasks that assign a class to each pixel of an image.

Images and masks are kept as files and decoded again for each batch. A mask has a class number per pixel; pixels with
other numbers are ignored in loss and scores. Both are resized, images bilinearly and masks to the nearest pixel, and
scored at that size.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import nn

from rankwise.errors import InputError, NotFiniteError, need
from rankwise.metrics.segmentation import CORPUS, PER_IMAGE, counts
from rankwise.nets.unet import IGNORE, masks
from rankwise.runs.answers import Answers
from rankwise.runs.store import PICTURE
from rankwise.tasks.base import Batch, Evaluation, Scored, Split, Task, evaluating
from rankwise.tasks.source import MEND

if TYPE_CHECKING:
    from datasets import Dataset

SHOWN = 4
"""Images in the picture of a run."""


@dataclass(frozen=True)
class Segmentation(Task):
    """Rows of `image` and `mask`, both as the bytes of a file, `idx`, and `where`, the name of a row in messages.

    Attributes:
        height, width: the size to which images and masks are resized, in pixels.
        augment: flip training images left to right, crop, brighten and darken them at random.
    """

    family = "segmentation"
    text: ClassVar[tuple[str, ...]] = ("image",)
    target: ClassVar[str] = "mask"
    main: ClassVar[str] = "dice"
    metrics: ClassVar[tuple[str, ...]] = ("dice", "iou")

    height: Annotated[int, Field(ge=1)] = 256
    width: Annotated[int, Field(ge=1)] = 256
    augment: bool = True

    @property
    def classes(self) -> int:
        """Channels of the logits: one for a foreground against a background."""
        return 1 if len(self.labels) == 2 else len(self.labels)

    def encode(self, split: Split, processor: None, max_length: int) -> "Dataset":
        """The rows unchanged, after a check of each. InputError for what is no image or no mask."""
        for row in split.data:
            _, mask = self._read(row["image"], row["mask"], row["where"])
            if (mask == IGNORE).all():
                raise InputError(
                    f"{row['where']}: no pixel of the mask has one of the {len(self.labels)} classes: correct it, or "
                    "leave it out"
                )
        datasets = need("datasets", "bench")
        pa = need("pyarrow", "bench")
        table = split.data.select_columns(["idx", "image", "mask"]).with_format("arrow")[:]
        return datasets.Dataset(table.append_column("length", pa.array([1] * table.num_rows)))

    def seen(self, split: Split) -> tuple[dict[str, int], dict[str, int]]:
        """How many images of `split` have each size, the most frequent first, and how many pixels have each class.

        Sizes are those of the files, `width×height`; pixels are counted after resizing.
        """
        sizes: Counter[str] = Counter()
        pixels = np.zeros(len(self.labels), dtype=np.int64)
        for row in split.data:
            picture = need("PIL.Image", "vision").open(io.BytesIO(row["image"]))
            sizes[f"{picture.width}×{picture.height}"] += 1
            _, mask = self._read(row["image"], row["mask"], row["where"])
            pixels += np.bincount(mask[mask != IGNORE], minlength=len(self.labels))
        return dict(sizes.most_common()), dict(zip(self.labels, pixels.tolist(), strict=True))

    def collate(self, model: nn.Module, processor: None, seed: int) -> Callable[[list[dict[str, Any]]], Batch]:
        def batch(rows: list[dict[str, Any]]) -> Batch:
            key = f"{seed}:{[row['idx'] for row in rows]}"
            random = np.random.default_rng(int(hashlib.sha256(key.encode()).hexdigest()[:16], 16))
            pairs = [self._read(row["image"], row["mask"], f"row {row['idx']}") for row in rows]
            return _tensors([_augmented(*pair, random) for pair in pairs] if self.augment else pairs)

        return batch

    def evaluate(
        self, model: nn.Module, evaluation: Evaluation, processor: None, batch_size: int, final: bool
    ) -> Scored:
        """`loss`, the mean of the batches' Dice losses, and Dice and IoU of the whole split; if `final` a picture."""
        pa = need("pyarrow", "bench")
        split = evaluation.split
        device = next(model.parameters()).device
        losses, overlaps, predicted, frequencies = [], [], [], []
        with evaluating(model):
            for start in range(0, len(evaluation.examples), batch_size):
                rows = evaluation.examples[start : start + batch_size]
                pairs = [self._read(*pair, split.name) for pair in zip(rows["image"], rows["mask"], strict=True)]
                batch = _tensors(pairs)
                outputs = model(**{name: values.to(device) for name, values in batch.items()})
                if not outputs.logits.isfinite().all():
                    raise NotFiniteError("a logit is not finite: the training has diverged; try a lower learning rate")
                losses.append((outputs.loss.item(), len(pairs)))
                prediction = masks(outputs.logits).cpu().numpy()
                truth = batch["labels"].numpy()
                overlaps.append(counts(prediction, truth, self.classes))
                counted = (classes[truth != IGNORE] for classes in (prediction, truth))
                frequencies.append([np.bincount(classes, minlength=len(self.labels)) for classes in counted])
                predicted.append(prediction.astype(np.uint8))
        overlap, predictions = np.concatenate(overlaps), np.concatenate(predicted)
        metrics = {"loss": sum(loss * size for loss, size in losses) / sum(size for _, size in losses)}
        metrics |= {name: CORPUS[name](overlap) for name in self.metrics}
        columns: dict[str, Any] = {
            "split": [split.name] * len(predictions),
            "idx": split.data["idx"][:],
            "label": [-1] * len(predictions),
            "prediction": [_png(mask) for mask in predictions],
            **{name: PER_IMAGE[name](overlap).tolist() for name in self.metrics},
            "statistics": overlap.reshape(len(overlap), -1).tolist(),
        }
        return Scored(
            {name + split.suffix: value for name, value in metrics.items()},
            pa.table(columns),
            files={PICTURE: self._picture(split, predictions)} if final else {},
            answers=self._answers(split, np.sum(frequencies, axis=0)) if final else None,
        )

    def _answers(self, split: Split, frequencies: np.ndarray) -> Answers:
        """The most frequent class, from the numbers (2, classes) of predicted and true pixels that are not ignored."""
        (count, most), (true, majority) = ((int(row.max()), self.labels[int(row.argmax())]) for row in frequencies)
        return Answers(split.name, int(frequencies[0].sum()), most, count, majority, true, what="pixels")

    def numbers(self, mask: np.ndarray) -> np.ndarray:
        """Class numbers of a mask (h, w) of the data; IGNORE for numbers that are no class."""
        return np.where((mask >= 0) & (mask < len(self.labels)), mask, IGNORE)

    def _read(self, image: bytes, mask: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
        """An image (height, width, 3) and its class numbers (height, width)."""
        pil = need("PIL.Image", "vision")
        pictures = []
        for name, content in (("image", image), ("mask", mask)):
            try:
                picture = pil.open(io.BytesIO(content))
                picture.load()
            except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:  # PIL may raise any of them
                raise InputError(f"{where}: the {name} cannot be read ({error}): {MEND}") from error
            pictures.append(picture)
        sizes = [f"{picture.width}×{picture.height}" for picture in pictures]
        if sizes[0] != sizes[1]:
            raise InputError(f"{where}: the image has {sizes[0]} pixels and its mask {sizes[1]}: make them equal")
        if pictures[0].mode.startswith(("I", "F")):  # PIL would clip these values at 255
            raise InputError(f"{where}: the image has more than 8 bits per channel: save it with 8")
        if pictures[1].mode not in ("L", "P", "I", "1") and not pictures[1].mode.startswith("I;16"):
            raise InputError(
                f"{where}: the mask has colours ({pictures[1].mode}): save it with a class number per pixel"
            )
        size = (self.width, self.height)
        colours = pictures[0].convert("RGB").resize(size, pil.Resampling.BILINEAR)
        classes = pictures[1].resize(size, pil.Resampling.NEAREST)
        return np.asarray(colours), self.numbers(np.asarray(classes).astype(np.int64))

    def _picture(self, split: Split, predictions: np.ndarray) -> bytes:
        """A few images, evenly spaced in the split, each above its true mask and the predicted one, as a PNG."""
        shown = min(SHOWN, len(predictions))
        columns = []
        for row in (number * len(predictions) // shown for number in range(shown)):
            image, truth = self._read(split.data["image"][row], split.data["mask"][row], split.name)
            prediction = np.where(truth == IGNORE, IGNORE, predictions[row])
            columns.append(np.concatenate([image, _coloured(truth), _coloured(prediction)]))
        return _png(np.concatenate(columns, axis=1))


def _augmented(image: np.ndarray, mask: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Flipped or not, cropped to at least three quarters of its sides and resized, brighter or darker."""
    pil = need("PIL.Image", "vision")
    if random.random() < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    height, width = mask.shape
    share = random.uniform(0.75, 1)
    h, w = max(1, round(share * height)), max(1, round(share * width))
    top, left = random.integers(height - h + 1), random.integers(width - w + 1)
    part = np.ascontiguousarray(image[top : top + h, left : left + w])
    image = np.asarray(pil.fromarray(part).resize((width, height), pil.Resampling.BILINEAR))
    rows = (top + (np.arange(height) * h) // height).astype(int)
    columns = (left + (np.arange(width) * w) // width).astype(int)
    image = np.clip(image * random.uniform(0.7, 1.3), 0, 255)
    return image, mask[np.ix_(rows, columns)]


def _tensors(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    images = np.stack([image for image, _ in pairs]).astype(np.float32) / 255
    labels = np.stack([mask for _, mask in pairs])
    return {"pixel_values": torch.from_numpy(images).movedim(-1, 1).contiguous(), "labels": torch.from_numpy(labels)}


def _coloured(mask: np.ndarray) -> np.ndarray:
    """A colour for each class, black for pixels to ignore: (h, w) to (h, w, 3)."""
    colours = need("matplotlib", "bench").colormaps["tab20"](np.arange(max(20, mask.max() + 1)) % 20)[:, :3]
    pixels = (255 * colours[np.clip(mask, 0, None)]).astype(np.uint8)
    pixels[mask == IGNORE] = 0
    return pixels


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    need("PIL.Image", "vision").fromarray(pixels).save(out, "PNG", optimize=True)
    return out.getvalue()
