"""What is exported of a network: pixels in, predictions or detections out.

Tensors name their axes: n images, h and w rows and columns, c classes, a anchors, k kept boxes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from services.trainer.worker.evaluation import MAX_DETECTIONS, MIN_CONFIDENCE, NMS_IOU
from services.trainer.worker.networks import Network
from services.trainer.worker.yolo import Yolo


class Graph(nn.Module):
    """A network as other programs call it; computes in fp32 or fp16, answers fp32.

    In fp16 boxes and confidences are still made of the network's output in fp32: above 512 two
    neighbouring fp16 numbers are half a pixel apart.

    Args:
        network: In evaluation mode; it is changed, and of no other use afterwards.
        half: Compute in fp16.
        dynamic: Take images of any size that is a multiple of the stride.
    """

    def __init__(self, network: Network, *, half: bool = False, dynamic: bool = False) -> None:
        super().__init__()
        self.network: Any = network
        self._half = half
        if half:
            network.half()
        if isinstance(network, Yolo):
            layers: Any = network.model
            head = layers[-1]
            head.dynamic = dynamic
            if half:
                _decode_in_float(head)
        elif dynamic:
            # Set on the instance: computed from the shape while the graph is recorded.
            network.__dict__["_anchors_of"] = _Anchors(network)

    def forward(self, images: Tensor) -> Tensor:
        """Takes RGB 0..1, (n, 3, h, w); returns predictions (n, 4 + c, a) as networks do."""
        predictions: Tensor = self.network(images.half() if self._half else images)[0]
        return predictions.float()


class EndToEnd(nn.Module):
    """A graph with threshold and non-maximum suppression behind it, per class as in evaluation."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Takes RGB 0..1, (n, 3, h, w).

        Returns:
            Detections of shape (n, MAX_DETECTIONS, 6): x1, y1, x2, y2 in pixels of the input,
            confidence, class; by descending confidence, then rows of zeros. And the predictions
            they were chosen of.
        """
        predictions = self._graph(images)
        return suppress(predictions), predictions


def suppress(predictions: Tensor) -> Tensor:
    """Reduces predictions (n, 4 + c, a) to detections (n, MAX_DETECTIONS, 6)."""
    centre, size = predictions[:, :2], predictions[:, 2:4] / 2
    boxes = torch.cat((centre - size, centre + size), dim=1).transpose(1, 2)  # (n, a, 4)
    scores = predictions[:, 4:]
    kept: Any = _Nms.apply(boxes, scores)  # (k, 3)
    num_anchors = scores.shape[2]
    mask = torch.zeros_like(scores).index_put(
        (kept[:, 0], kept[:, 1], kept[:, 2]), torch.ones_like(kept[:, 0], dtype=scores.dtype)
    )
    # Room for the rows of zeros, however few boxes there are.
    ranked = nn.functional.pad((scores * mask).flatten(1), (0, MAX_DETECTIONS))
    confidences, places = ranked.topk(MAX_DETECTIONS, dim=1)
    classes = torch.div(places, num_anchors, rounding_mode="floor")
    chosen = boxes.gather(1, (places % num_anchors).unsqueeze(2).expand(-1, -1, 4))
    rows = torch.cat((chosen, confidences.unsqueeze(2), classes.unsqueeze(2).float()), dim=2)
    return rows * (confidences > 0).unsqueeze(2).float()


class _Nms(torch.autograd.Function):
    """Non-maximum suppression for each image and class, as ONNX's operator does it."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor) -> Tensor:
        """Takes x1, y1, x2, y2 boxes (n, a, 4) and scores (n, c, a).

        Returns:
            Image, class and anchor of each box kept, shape (k, 3), int64.
        """
        kept = [torch.zeros((0, 3), dtype=torch.int64)]
        for image in range(boxes.shape[0]):
            for label in range(scores.shape[1]):
                anchors = torch.nonzero(scores[image, label] > MIN_CONFIDENCE)[:, 0]
                best = torch.ops.torchvision.nms(
                    boxes[image, anchors], scores[image, label, anchors], NMS_IOU
                )[:MAX_DETECTIONS]
                place = torch.tensor([image, label]).expand(len(best), 2)
                kept.append(torch.cat((place, anchors[best, None]), dim=1))
        return torch.cat(kept)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any) -> Any:
        """Returns the operator that the recorded graph gets in its place."""

        def constant(value: Any, dtype: torch.dtype) -> Any:
            return g.op("Constant", value_t=torch.tensor([value], dtype=dtype))

        return g.op(
            "NonMaxSuppression",
            boxes,
            scores,
            constant(MAX_DETECTIONS, torch.int64),
            constant(NMS_IOU, torch.float32),
            constant(MIN_CONFIDENCE, torch.float32),
        )


class _Anchors:
    """EfficientDet's anchors for a size that is only known when the exported graph runs."""

    def __init__(self, network: Any) -> None:
        from effdet.anchors import Anchors

        config = network._config
        self._levels: list[tuple[int, Tensor]] = []
        side = 2**config.max_level
        boxes = Anchors(
            config.min_level,
            config.max_level,
            config.num_scales,
            config.aspect_ratios,
            config.anchor_scale,
            (side, side),
        ).boxes
        num_each = config.num_scales * len(config.aspect_ratios)
        start = 0
        for level in range(config.min_level, config.max_level + 1):
            first = boxes[start : start + num_each]
            self._levels.append((2**level, first[:, 2:] - first[:, :2]))
            start += (side // 2**level) ** 2 * num_each

    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns centre y, centre x, height, width of every anchor, shape (a, 4)."""
        rows = []
        for stride, sizes in self._levels:
            y, x = (
                (torch.arange(pixels.shape[axis] // stride).float() + 0.5) * stride
                for axis in (2, 3)
            )
            grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 1, 2)
            centres = grid.expand(-1, len(sizes), -1)
            extents = sizes.unsqueeze(0) + torch.zeros_like(centres)
            rows.append(torch.cat((centres, extents), dim=2).reshape(-1, 4))
        return torch.cat(rows)


def _decode_in_float(head: Any) -> None:
    head.dfl.float()
    inference = head._inference

    def decode(raw: dict[str, Any]) -> Tensor:
        decoded: Tensor = inference(
            {
                "boxes": raw["boxes"].float(),
                "scores": raw["scores"].float(),
                "feats": [feature.float() for feature in raw["feats"]],
            }
        )
        return decoded

    head._inference = decode
