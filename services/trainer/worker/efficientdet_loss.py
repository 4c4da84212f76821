"""EfficientDet's labels and losses, as effdet computes them, for all levels at once.

Boxes and anchors are centre y, centre x, height, width in model pixels. Axes: n images, a anchors,
c classes, m boxes, p pairs of an anchor and the box it shall find.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_ALPHA, _GAMMA = 0.25, 1.5
_DELTA = 0.1
_MATCH_IOU = 0.5
_MIN_SIDE_PX = 1.0


class Positives(NamedTuple):
    """The anchors that shall find a box.

    Attributes:
        images: Index of the image, shape (p,).
        anchors: Index of the anchor, shape (p,).
        classes: Index of the class, shape (p,).
        codes: What the network shall answer: offset of the centre in anchor sizes and log of the
            size in anchor sizes, shape (p, 4).
    """

    images: Tensor
    anchors: Tensor
    classes: Tensor
    codes: Tensor


@torch.no_grad()
def label(
    targets: Mapping[str, Tensor], anchors: Tensor, *, num_images: int, height: int, width: int
) -> Positives:
    """Chooses the anchors of every box: those that overlap it most, IoU at least 0.5, and its best.

    A side below a pixel counts as a pixel; a box that is not finite or that no anchor touches has
    no anchors.

    Args:
        targets: batch_idx (m,), cls (m, 1), bboxes (m, 4): centre x, centre y, width, height in
            0..1 of the image.
        anchors: Shape (a, 4).
        num_images: Images in the batch.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
    """
    bboxes = targets["bboxes"].float()
    boxes = bboxes[:, [1, 0, 3, 2]] * bboxes.new_tensor((height, width, height, width))
    finite = boxes.isfinite().all(dim=1)
    boxes = torch.cat((boxes[:, :2], boxes[:, 2:].clamp(min=_MIN_SIDE_PX)), dim=1)
    found = []
    for image in range(num_images):
        (rows,) = torch.nonzero((targets["batch_idx"] == image) & finite, as_tuple=True)
        if not len(rows):
            continue
        chosen, matched = _match(anchors, boxes[rows])
        found.append((torch.full_like(chosen, image), chosen, rows[matched]))
    if not found:
        none = bboxes.new_zeros(0, dtype=torch.long)
        return Positives(none, none, none, bboxes.new_zeros((0, 4)))
    images, chosen, rows = map(torch.cat, zip(*found, strict=True))
    own, box = anchors[chosen], boxes[rows]
    codes = torch.cat(((box[:, :2] - own[:, :2]) / own[:, 2:], (box[:, 2:] / own[:, 2:]).log()), 1)
    return Positives(images, chosen, targets["cls"].view(-1)[rows].long(), codes)


def _match(anchors: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns indices of anchors (p,) and of the box (p,) each shall find."""
    overlap = _iou(boxes, anchors)
    best, matches = overlap.max(dim=0)
    matches = matches.masked_fill(best < _MATCH_IOU, -1)
    # The best anchor of a box is its own even if it is another's too; the first of two keeps it.
    most, favourite = overlap.max(dim=1)
    numbers = torch.arange(len(boxes), device=boxes.device)[most > 0]
    first = torch.full_like(matches, len(boxes))
    first.scatter_reduce_(0, favourite[most > 0], numbers, "amin")
    matches = torch.where(first < len(boxes), first, matches)
    (chosen,) = torch.nonzero(matches >= 0, as_tuple=True)
    return chosen, matches[chosen]


def _iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Computes IoU of all pairs, shape (m, a)."""
    (y1, x1), (y2, x2) = (boxes[:, :2] - boxes[:, 2:] / 2).T, (boxes[:, :2] + boxes[:, 2:] / 2).T
    low, high = anchors[:, :2] - anchors[:, 2:] / 2, anchors[:, :2] + anchors[:, 2:] / 2
    tall = torch.minimum(y2[:, None], high[:, 0]) - torch.maximum(y1[:, None], low[:, 0])
    wide = torch.minimum(x2[:, None], high[:, 1]) - torch.maximum(x1[:, None], low[:, 1])
    both = tall.clamp_(min=0).mul_(wide.clamp_(min=0))
    areas = (boxes[:, 2] * boxes[:, 3])[:, None] + anchors[:, 2] * anchors[:, 3]
    return both.div_(areas.sub_(both))


def focal_loss(logits: Tensor, positives: Positives) -> Tensor:
    """Sums the focal loss (Lin et al. 2017, equation 5) of all anchors and classes.

    Args:
        logits: Shape (n, a, c).
        positives: Where the class is there; it is nowhere else.
    """
    there = logits[positives.images, positives.anchors, positives.classes]
    return (
        (1 - _ALPHA) * (_modulated(logits).sum() - _modulated(there).sum())
        + _ALPHA * _modulated(-there).sum()
    )  # fmt: skip


def _modulated(logits: Tensor) -> Tensor:
    """Returns p**gamma * -log(1 - p) of a class that is not there."""
    surprise = F.softplus(-logits)  # -log(p); -log(1 - p) is logits more
    return (surprise * -_GAMMA).exp() * (surprise + logits)


def box_loss(codes: Tensor, positives: Positives) -> Tensor:
    """Sums the Huber loss (delta 0.1) of the positive anchors' four codes.

    Args:
        codes: Shape (n, a, 4).
        positives: Which anchors shall find what.
    """
    found = codes[positives.images, positives.anchors]
    return F.huber_loss(found, positives.codes, reduction="sum", delta=_DELTA)
