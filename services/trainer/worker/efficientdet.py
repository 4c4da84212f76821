"""EfficientDet models: effdet's network; its labels and losses are in `efficientdet_loss`.

Tensors name their axes: n images, h and w rows and columns, a anchors, c classes, m labelled boxes.
Boxes and anchors are centre y, centre x, height, width in model pixels unless said otherwise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.trainer.worker.efficientdet_loss import box_loss, focal_loss, label
from services.trainer.worker.networks import Network
from services.trainer.worker.spec import Value

with warnings.catch_warnings():
    # effdet compiles its labeller with torch.jit.script as it is imported; it is not used here.
    warnings.simplefilter("ignore", FutureWarning)
    import effdet
    from effdet.anchors import Anchors
    from effdet.efficientdet import BiFpn, HeadNet

BOX_GAIN, CLS_GAIN = 50.0, 1.0
"""effdet's, of the losses: defaults of this family."""

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's RGB: what EfficientNet's initial weights are made for."""
_MAX_LOG_SCALE = math.log(1000 / 16)
"""Sizes beyond this many anchors are no boxes; their exponential might be infinite."""


class Raw(NamedTuple):
    """What the network answers, before boxes and probabilities are made of it.

    Attributes:
        logits: Of each class, shape (n, a, c).
        codes: Offset of the centre in anchor sizes, log of the size in anchor sizes; (n, a, 4).
        anchors: Shape (a, 4).
        size: Height and width of the images.
    """

    logits: Tensor
    codes: Tensor
    anchors: Tensor
    size: tuple[int, int]


def build(
    model: str, *, num_classes: int, image_size: int, hyperparameters: Mapping[str, Value]
) -> EfficientDet:
    """Builds an EfficientDet; see `networks.build`. Nothing is ever downloaded."""
    scale = model.removeprefix("efficientdet-d")
    config = effdet.get_efficientdet_config(f"tf_efficientdet_d{scale}")
    config.update(
        # Sides are multiples of 128, so that every level halves exactly: padding depending on the
        # size, as TensorFlow's, would only cost time, as do biases before a BatchNorm.
        backbone_name=config.backbone_name.removeprefix("tf_"),
        backbone_args={"drop_path_rate": 0.0},
        pad_type="",
        redundant_bias=False,
        num_classes=num_classes,
        image_size=(image_size, image_size),
    )
    return EfficientDet(
        config,
        box_gain=float(hyperparameters.get("box", BOX_GAIN)),
        cls_gain=float(hyperparameters.get("cls", CLS_GAIN)),
        dropout=float(hyperparameters.get("dropout", 0.0)),
    )


class EfficientDet(Network):
    """effdet's network, most of it computed in another way; the weights are the same.

    Args:
        config: effdet's configuration.
        box_gain: Weight of the box loss.
        cls_gain: Weight of the class loss.
        dropout: Share of the features before the last layers that is left out in training.
    """

    stride = 128
    num_calibration_images = 64
    _mean: Tensor
    _std: Tensor

    def __init__(self, config: Any, *, box_gain: float, cls_gain: float, dropout: float) -> None:
        super().__init__()
        self.net = effdet.EfficientDet(config, pretrained_backbone=False)
        self._config = config
        self._box_gain, self._cls_gain = box_gain, cls_gain
        self._anchors: dict[tuple[int, int, torch.device], Tensor] = {}
        self.register_buffer("_mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
                module.__class__ = _Pointwise
            elif isinstance(module, BiFpn):
                module.__class__ = _BiFpn
            elif isinstance(module, HeadNet):
                module.__class__ = _Head
                module.dropout = dropout
            elif hasattr(module, "inplace"):
                module.inplace = False  # autograd would copy what is overwritten

    def forward(self, pixels: Tensor) -> Any:
        """Runs the network; see `networks.Network`. The raw outputs are `Raw`."""
        logits, codes = self.net((pixels - self._mean) / self._std)
        raw = Raw(
            _rows(logits, self._config.num_classes),
            _rows(codes, 4),
            self._anchors_of(pixels),
            (pixels.shape[2], pixels.shape[3]),
        )
        return raw if self.training else (_decode(raw), raw)

    def loss(self, targets: Mapping[str, Tensor], raw: Raw) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the focal loss of the classes and the Huber loss of the boxes.

        Args:
            targets: batch_idx (m,), cls (m, 1), bboxes (m, 4): centre x, centre y, width, height
                in 0..1 of the image.
            raw: What forward answered.

        Returns:
            Their sum times the number of images, and each, by name.
        """
        raw = Raw(*raw)  # it may come as a list
        height, width = raw.size
        positives = label(
            targets, raw.anchors, num_images=len(raw.logits), height=height, width=width
        )
        num_positives = len(positives.anchors) + 1
        box = box_loss(raw.codes, positives) * (self._box_gain / num_positives / 4)
        cls = focal_loss(raw.logits, positives) * (self._cls_gain / num_positives)
        parts = {"box_loss": box.detach(), "cls_loss": cls.detach()}
        return (box + cls) * len(raw.logits), parts

    def layers(self) -> list[nn.Module]:
        """Returns ten layers: stem, seven stages of the backbone, BiFPN, the two heads as one."""
        backbone, heads = self.net.backbone, (self.net.class_net, self.net.box_net)
        stem = nn.ModuleList((backbone.conv_stem, backbone.bn1))
        return [stem, *backbone.blocks, self.net.fpn, nn.ModuleList(heads)]

    def _anchors_of(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[2:]
        key = (int(height), int(width), pixels.device)
        if key not in self._anchors:
            config = self._config
            corners = Anchors(
                config.min_level,
                config.max_level,
                config.num_scales,
                config.aspect_ratios,
                config.anchor_scale,
                key[:2],
            ).boxes
            low, high = corners.chunk(2, dim=1)
            self._anchors[key] = torch.cat(((low + high) / 2, high - low), dim=1).to(pixels.device)
        return self._anchors[key]


class _Pointwise(nn.Conv2d):
    """A 1 x 1 convolution; learns on CPUs as one product of matrices, which takes less time."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolves."""
        is_rows = input.is_contiguous(memory_format=torch.channels_last)
        if not (self.training and is_rows and input.device.type == "cpu"):
            return super().forward(input)
        rows = input.permute(0, 2, 3, 1)
        return F.linear(rows, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class _BiFpn(BiFpn):  # type: ignore[misc]
    """effdet's BiFPN without its stacks and copies, for sides that halve exactly."""

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Takes P3, P4, P5 and returns P3 to P7."""
        levels = [*x]
        for resample in self.resample.values():
            levels.append(resample(levels[-1]))
        for cell in self.cell:
            nodes = [*levels]
            for node in cell.fnode:
                nodes.append(node.after_combine.conv(F.silu(_combine(node.combine, nodes))))
            levels = nodes[-cell.num_levels :]
        return levels


def _combine(combine: Any, nodes: list[Tensor]) -> Tensor:
    """Adds up nodes of neighbouring levels, weighted: fast normalised fusion of the paper."""
    weights: Any = [None] * len(combine.inputs_offsets)
    if combine.edge_weights is not None:
        shares = combine.edge_weights.relu()
        weights = (shares / (shares.sum() + 0.0001)).to(nodes[0].dtype).unbind()
    resamples = combine.resample.values()
    terms = [
        _resample(resample, nodes[offset], weight)
        for offset, resample, weight in zip(combine.inputs_offsets, resamples, weights, strict=True)
    ]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _resample(resample: Any, node: Tensor, weight: Tensor | None) -> Tensor:
    """Brings a node to the level it is added to; weights it while it is small."""
    if hasattr(resample, "conv"):
        node = resample.conv(node)
    if hasattr(resample, "downsample"):
        node = resample.downsample(node)
    if weight is not None:
        node = node * weight
    if hasattr(resample, "upsample"):
        node = F.interpolate(node, scale_factor=2.0, mode="nearest")
    return node


class _Head(HeadNet):  # type: ignore[misc]
    """effdet's head, with dropout before its last layer."""

    dropout: float

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Takes P3 to P7 and returns what the head finds in each."""
        outputs = []
        for number, level in enumerate(x):
            for conv, norms in zip(self.conv_rep, self.bn_rep, strict=True):
                level = F.silu(norms[number](conv(level)))
            outputs.append(self.predict(F.dropout(level, self.dropout, self.training)))
        return outputs


def _rows(levels: list[Tensor], num_each: int) -> Tensor:
    """Lines up a head's outputs for each anchor of all levels: shape (n, a, num_each)."""
    # Not len(): exported graphs take any number of images.
    rows = [x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, num_each) for x in levels]
    return torch.cat(rows, dim=1)


def _decode(raw: Raw) -> Tensor:
    """Returns centre x, centre y, width, height in pixels and probabilities: (n, 4 + c, a)."""
    codes, anchors = raw.codes.float(), raw.anchors
    centre = codes[..., :2] * anchors[:, 2:] + anchors[:, :2]
    size = codes[..., 2:].clamp(max=_MAX_LOG_SCALE).exp() * anchors[:, 2:]
    parts = (centre.flip(-1), size.flip(-1), raw.logits.float().sigmoid())
    return torch.cat(parts, dim=-1).transpose(1, 2)
