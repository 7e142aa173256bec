"""U-Nets (Ronneberger et al. 2015, arXiv 1505.04597): the one of a course report on SoRA (MIPT NLA 2023), and a refined
one that learns more in the same time.

Both take `pixel_values` (n, 3, H, W), floats from 0 to 1, and return logits (n, classes, H, W). For one class the
probability of the foreground is `logits.sigmoid()`, which in the report's network is the last layer; for several it is
`logits.softmax(dim=1)`. With `labels` (n, H, W), integers with -100 for pixels to ignore, they also return the Dice
loss, so that a Trainer can train them.

>>> import torch
>>> from rankwise.nets.unet import UNet
>>> model = UNet()
>>> sum(p.numel() for p in model.parameters())
1500269
>>> images, truth = torch.rand(2, 3, 256, 256), torch.randint(0, 2, (2, 256, 256))
>>> out = model(images, labels=truth)
>>> out.loss.backward()
>>> out.logits.shape
torch.Size([2, 1, 256, 256])

Names for targets and heads: the linear layer in the middle is `bottleneck`; the convolutions on the way down and up are
`down.N.conv1`, `down.N.conv2`, `up.N.block.conv1` and `up.N.block.conv2`; the last layer is `classifier`, the head.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import redirect_stdout
from itertools import pairwise
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import SemanticSegmenterOutput

from rankwise.errors import InputError

IGNORE = -100
"""The label of pixels to ignore."""
COLOURS = 3


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """One minus the soft Dice coefficient of the whole batch, a tensor ():

        1 − mean_c (2 Σ p t + 1) / (Σ p + Σ t + 1)

    over the pixels that are not ignored, where p is the probability of class c and t is 1 where c is the label. The
    mean is over the classes that occur in the labels; with one channel it is the foreground, whether it occurs or not.
    If all pixels are ignored the loss is 0. Computed in fp32 or better.

    Args:
        logits: (n, classes, H, W). labels: (n, H, W), -100 or 0 to classes - 1; for one channel 0 or 1.
    Raises:
        InputError: labels whose shape does not fit the logits, or out of range.
    """
    n, classes, *image = logits.shape
    most = max(classes, 2) - 1
    if labels.shape != (n, *image):
        raise InputError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}")
    counts = labels != IGNORE
    classes_of = labels.where(counts, 0).long()
    low, high = (int(x) for x in classes_of.aminmax())
    if low < 0 or high > most:
        raise InputError(f"labels go from {low} to {high}; they must be 0 to {most}, or {IGNORE} for pixels to ignore")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if classes == 1:
        p, t = logits.sigmoid(), classes_of[:, None]
    else:
        p, t = logits.softmax(dim=1), functional.one_hot(classes_of, classes).movedim(-1, 1)
    p, t = p * counts[:, None], t * counts[:, None]
    pixels = (0, 2, 3)
    size = t.sum(pixels)
    dice = (2 * (p * t).sum(pixels) + 1) / (p.sum(pixels) + size + 1)
    occurs = size > 0 if classes > 1 else torch.ones_like(size)
    return ((1 - dice) * occurs).sum() / occurs.sum().clamp(min=1)


def masks(logits: Tensor) -> Tensor:
    """The most likely class of each pixel, (n, H, W) int64, from logits (n, classes, H, W); one channel: p > ½."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)


class Block(nn.Module):
    """Two 3×3 convolutions without bias, each with batch norm and ReLU: (n, inputs, h, w) to (n, width, h, w).

    With `residual` the input is added before the last ReLU (He et al. 2015, arXiv 1512.03385), through a 1×1
    convolution and batch norm where the width changes.
    """

    def __init__(self, inputs: int, width: int, residual: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.beside: nn.Module | None = None  # the name is part of saved weights
        if residual:
            self.beside = nn.Identity() if inputs == width else _pointwise(inputs, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(y if self.beside is None else y + self.beside(x))


class Up(nn.Module):
    """Doubles the resolution by a transposed 2×2 convolution, joins the skip connection and applies a block.

    (n, inputs, h, w) and a skip (n, width, 2h, 2w) to (n, width, 2h, 2w).
    """

    def __init__(self, inputs: int, width: int, refined: bool = False):
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, width, 2, stride=2)
        self.gate = Attention(inputs, width) if refined else None
        self.block = Block(2 * width, width, residual=refined)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if self.gate is not None:
            skip = self.gate(skip, x)
        return self.block(torch.cat([self.up(x), skip], dim=1))


class Attention(nn.Module):
    """Weights the positions of a skip connection by the level below (attention U-Net, Oktay et al. 2018, arXiv
    1804.03999, eq. 1 and 2):

        skip ∘ σ(ψ(ReLU(W_x skip + W_g below)))

    W_x has stride 2, so the weights have the resolution of the level below, and are upsampled bilinearly.
    """

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.of_skip = _pointwise(width, width, stride=2)
        self.of_below = _pointwise(inputs, width)
        self.weight = nn.Sequential(nn.Conv2d(width, 1, 1, bias=False), nn.BatchNorm2d(1))

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        weight = self.weight(functional.relu(self.of_skip(skip) + self.of_below(below))).sigmoid()
        return skip * functional.interpolate(weight, scale_factor=2, mode="bilinear")


def _pointwise(inputs: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))


_CARD = """---
{{ card_data }}
---

A network for segmentation. Load it with `from_pretrained` of its class in `rankwise.nets.unet`.
"""


class Segmenter(nn.Module, PyTorchModelHubMixin, ABC, model_card_template=_CARD):
    """What both networks share: the way down, the middle, the way up, the loss, and the hub's file format.

    `save_pretrained(folder)` writes config.json and model.safetensors. `from_pretrained(folder)` builds the network
    from them, in evaluation mode; it raises RuntimeError for weights that do not fit.
    """

    step: int
    """Height and width of images must be multiples of this."""
    down: nn.ModuleList
    up: nn.ModuleList
    classifier: nn.Conv2d

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SemanticSegmenterOutput:
        """`logits` (n, classes, H, W) and, with labels, `loss` (): the Dice loss.

        Raises:
            InputError: images that the network cannot take, or labels that do not fit them.
        """
        if pixel_values.dim() != 4 or pixel_values.shape[1] != COLOURS:
            raise InputError(f"images must be of shape (n, {COLOURS}, H, W), not {tuple(pixel_values.shape)}")
        x = self._begin(pixel_values)
        skips = []
        for block in self.down:
            skips.append(block(x))
            x = functional.max_pool2d(skips[-1], 2)
        x = self._middle(x)
        for up, skip in zip(self.up, reversed(skips), strict=True):
            x = up(x, skip)
        logits = self._end(x)
        loss = None if labels is None else dice_loss(logits, labels)
        return SemanticSegmenterOutput(loss=loss, logits=logits)

    def train(self, mode: bool = True) -> "Segmenter":
        """As for any module, except that batch norms with frozen weights stay in evaluation mode.

        An adapter does not contain their running statistics, so it would not fit the pretrained network if they moved.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    @abstractmethod
    def _begin(self, images: Tensor) -> Tensor:
        """Input of the first block, from images (n, 3, H, W)."""

    @abstractmethod
    def _middle(self, x: Tensor) -> Tensor:
        """What happens between the way down and the way up, shapes unchanged."""

    @abstractmethod
    def _end(self, x: Tensor) -> Tensor:
        """Logits (n, classes, H, W) from the output of the last block."""

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **rest: Any) -> Any:
        with redirect_stdout(sys.stderr):  # the hub's class prints a line, and by default ignores missing weights
            return super()._from_pretrained(strict=strict, **rest)


class UNet(Segmenter):
    """The network of the report: narrow convolutions, and a fully connected layer with ReLU over the whole image.

    Each level of the way down is a block and a 2×2 max pooling; each level of the way up is a transposed 2×2
    convolution with bias, the concatenation with the output of the block at that level, and a block. The last layer is
    a 1×1 convolution with bias. At 256×256 the default has 1,500,269 parameters (1024 → 1024 in the middle), and the
    widths of the report's last notebook, (4, 8, 16, 32, 32), have 4,309,261 (2048 → 2048).

    Args:
        widths: channels per level; each level halves the resolution.
        classes: channels of the logits; 1 is foreground against background.
        size: (height, width) of the images, or one number for both; no other size is accepted.
    Raises:
        InputError: no width, a number below 1, or a size not divisible by 2 to the number of widths.
    """

    def __init__(
        self,
        widths: Sequence[int] = (4, 8, 16, 32, 64, 64),
        classes: int = 1,
        size: int | Sequence[int] = 256,
    ):
        super().__init__()
        self.step = 2 ** len(_checked(widths, classes))
        self.size = _size(size, self.step)
        self.down = _way_down(COLOURS, widths)
        features = widths[-1] * (self.size[0] // self.step) * (self.size[1] // self.step)
        self.bottleneck = nn.Linear(features, features)
        self.up = _way_up(widths)
        self.classifier = nn.Conv2d(widths[0], classes, 1)

    def _begin(self, images: Tensor) -> Tensor:
        if (size := tuple(images.shape[-2:])) != self.size:
            raise InputError(
                f"this U-Net takes images of {_text(self.size)} (height×width), not {_text(size)}: resize them, or "
                "build the network with their size"
            )
        return images

    def _middle(self, x: Tensor) -> Tensor:
        return functional.relu(self.bottleneck(x.flatten(1))).view_as(x)

    def _end(self, x: Tensor) -> Tensor:
        return self.classifier(x)


class RefinedUNet(Segmenter):
    """A wider U-Net at half the resolution, with attention on its skip connections and residual blocks.

    On a CPU a step costs about as much as one of the default `UNet`, since nothing is computed at full resolution. The
    first layer is a convolution of stride 2. The logits are upsampled bilinearly at the end, which avoids the
    checkerboard of transposed and sub-pixel convolutions (Odena et al. 2016, doi 10.23915/distill.00003). Batch norm
    follows all 1×1 and 3×3 convolutions except the last, and the bottleneck, which joins each position with the mean
    over the image,

        x ← ReLU(x + norm(W [x, mean(x)] + b)),    W (c, 2c),

    so that every position depends on the whole image, as in the report's fully connected layer, but at any size.

    Args:
        widths: channels per level; each level halves the resolution once more.
        classes: channels of the logits; 1 is foreground against background.
        size: (height, width) of the images, or one number for both. It is only checked: any other divisible size works.
    Raises:
        InputError: no width, a number below 1, or a size not divisible by 2 to one more than the number of widths.
    """

    def __init__(
        self,
        widths: Sequence[int] = (16, 24, 32, 64),
        classes: int = 1,
        size: int | Sequence[int] = 256,
    ):
        super().__init__()
        self.step = 2 ** (1 + len(_checked(widths, classes)))
        self.size = _size(size, self.step)
        first, last = widths[0], widths[-1]
        self.stem = nn.Conv2d(COLOURS, first, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(first)
        self.down = _way_down(first, widths, refined=True)
        self.bottleneck = nn.Linear(2 * last, last)
        self.bottleneck_norm = nn.BatchNorm2d(last)
        self.up = _way_up(widths, refined=True)
        self.classifier = nn.Conv2d(first, classes, 1)

    def _begin(self, images: Tensor) -> Tensor:
        _size(images.shape[-2:], self.step)
        return functional.relu(self.stem_norm(self.stem(images)))

    def _middle(self, x: Tensor) -> Tensor:
        last = x.movedim(1, -1)  # (n, h, w, c): a linear layer takes channels last
        both = torch.cat([last, last.mean(dim=(1, 2), keepdim=True).expand_as(last)], dim=-1)
        return functional.relu(x + self.bottleneck_norm(self.bottleneck(both).movedim(-1, 1)))

    def _end(self, x: Tensor) -> Tensor:
        return functional.interpolate(self.classifier(x), scale_factor=2, mode="bilinear")


def _way_down(inputs: int, widths: Sequence[int], refined: bool = False) -> nn.ModuleList:
    return nn.ModuleList(Block(i, o, refined) for i, o in pairwise((inputs, *widths)))


def _way_up(widths: Sequence[int], refined: bool = False) -> nn.ModuleList:
    return nn.ModuleList(Up(i, o, refined) for i, o in pairwise((widths[-1], *reversed(widths))))


def _checked(widths: Sequence[int], classes: int) -> Sequence[int]:
    if not widths or min(*widths, classes) < 1:
        raise InputError(
            f"widths {tuple(widths)} and classes {classes} must be numbers above 0, with at least one width"
        )
    return widths


def _size(size: int | Sequence[int], step: int) -> tuple[int, int]:
    """(height, width); InputError unless both are multiples of `step`."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1 or height % step or width % step:
        raise InputError(
            f"images of {_text((height, width))} (height×width) do not fit: both must be multiples of {step}; "
            "resize or pad them, or use fewer widths"
        )
    return height, width


def _text(size: Sequence[int]) -> str:
    return "×".join(map(str, size))
