"""EfficientDet models: effdet's network with our forward pass, anchor labels and losses.

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

MODELS = tuple(f"efficientdet-d{scale}" for scale in range(8))
STRIDE = 128

_BOX_GAIN, _CLS_GAIN = 7.5, 0.5

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's RGB: what EfficientNet's initial weights are made for."""
_MAX_LOG_SCALE = math.log(1000 / 16)


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
) -> EfficientDetNetwork:
    """Builds an EfficientDet with random weights; never downloads any.

    Args:
        model: Id of the model, e.g. efficientdet-d0.
        num_classes: Number of classes.
        image_size: Side of the square the model is trained at, a multiple of 128.
        hyperparameters: Gains of the losses, `box` and `cls`.
    """
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
    return EfficientDetNetwork(
        config,
        box_gain=float(hyperparameters.get("box", _BOX_GAIN)),
        cls_gain=float(hyperparameters.get("cls", _CLS_GAIN)),
    )


class EfficientDetNetwork(Network):
    """One EfficientDet; see `networks.Network` for what the loop asks of it.

    Args:
        config: effdet's configuration.
        box_gain: Weight of the box loss.
        cls_gain: Weight of the class loss.
    """

    stride = STRIDE
    _mean: Tensor
    _std: Tensor

    def __init__(self, config: Any, *, box_gain: float, cls_gain: float) -> None:
        super().__init__()
        self.net = effdet.EfficientDet(config, pretrained_backbone=False)
        self._config = config
        self._gains = {"box_loss": box_gain, "cls_loss": cls_gain}
        self._anchors: dict[tuple[int, int, torch.device], Tensor] = {}
        self.register_buffer("_mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        for module in self.net.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # autograd would copy what is overwritten

    def forward(self, pixels: Tensor) -> Any:
        """Runs the network.

        Args:
            pixels: RGB 0..1, shape (n, 3, h, w), h and w multiples of 128.

        Returns:
            Raw when training; else predictions of shape (n, 4 + c, a), centre x, centre y, width
            and height in model pixels and a probability per class, and Raw.
        """
        features = self.net.backbone((pixels - self._mean) / self._std)
        levels = _fuse(self.net.fpn, features)
        raw = Raw(
            _head(self.net.class_net, levels, self._config.num_classes),
            _head(self.net.box_net, levels, 4),
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
            Their sum times the number of images, and each, detached, by name.
        """
        height, width = raw.size
        positives = label(
            targets, raw.anchors, num_images=len(raw.logits), height=height, width=width
        )
        share = len(raw.logits) / (len(positives.anchors) + 1)
        parts = {
            "box_loss": self._gains["box_loss"] * share / 4 * box_loss(raw.codes, positives),
            "cls_loss": self._gains["cls_loss"] * share * focal_loss(raw.logits, positives),
        }
        total = torch.stack(list(parts.values())).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    def layers(self) -> list[nn.Module]:
        """Returns nine layers from the input on: stem, seven stages of the backbone, BiFPN."""
        backbone = self.net.backbone
        stem = nn.ModuleList((backbone.conv_stem, backbone.bn1))
        return [stem, *backbone.blocks, self.net.fpn]

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


def _fuse(fpn: Any, features: list[Tensor]) -> list[Tensor]:
    """Runs effdet's BiFPN without its stacks and copies; equal to `fpn(features)`."""
    levels = [*features]
    for resample in fpn.resample.values():
        levels.append(resample(levels[-1]))
    for cell in fpn.cell:
        nodes = [*levels]
        for node in cell.fnode:
            nodes.append(node.after_combine.conv(F.silu(_combine(node.combine, nodes))))
        levels = nodes[-cell.num_levels :]
    return levels


def _combine(combine: Any, nodes: list[Tensor]) -> Tensor:
    """Adds up nodes of neighbouring levels, weighted: fast normalised fusion of the paper."""
    weights: Any = None
    if combine.edge_weights is not None:
        weights = combine.edge_weights.relu()
        weights = (weights / (weights.sum() + 0.0001)).to(nodes[0].dtype).unbind()
    total: Any = None
    for index, (offset, resample) in enumerate(
        zip(combine.inputs_offsets, combine.resample.values(), strict=True)
    ):
        node = nodes[offset]
        if hasattr(resample, "conv"):
            node = resample.conv(node)
        if hasattr(resample, "downsample"):
            node = resample.downsample(node)
        if weights is not None:
            node = node * weights[index]  # the smaller of the two sizes, if it grows
        if hasattr(resample, "upsample"):
            node = F.interpolate(node, scale_factor=2.0, mode="nearest")
        total = node if total is None else total + node
    return torch.as_tensor(total)


def _head(head: Any, levels: list[Tensor], num_outputs: int) -> Tensor:
    """Runs a head on all levels: shape (n, a, num_outputs)."""
    outputs = []
    for number, level in enumerate(levels):
        for conv, norms in zip(head.conv_rep, head.bn_rep, strict=True):
            level = F.silu(norms[number](conv(level)))
        rows = head.predict(level).permute(0, 2, 3, 1)
        outputs.append(rows.reshape(rows.shape[0], -1, num_outputs))
    return torch.cat(outputs, dim=1)


def _decode(raw: Raw) -> Tensor:
    """Returns centre x, centre y, width, height in pixels and probabilities: (n, 4 + c, a)."""
    codes, anchors = raw.codes.float(), raw.anchors
    centre = codes[..., :2] * anchors[:, 2:] + anchors[:, :2]
    size = codes[..., 2:].clamp(max=_MAX_LOG_SCALE).exp() * anchors[:, 2:]
    parts = (centre.flip(-1), size.flip(-1), raw.logits.float().sigmoid())
    return torch.cat(parts, dim=-1).transpose(1, 2)
