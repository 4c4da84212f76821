"""An exported model that finds things in pictures, with ONNX Runtime."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from detflow.images import Pixels
from detflow.resize import BORDER_VALUE

_INPUT = "images"


@dataclass(frozen=True, slots=True)
class Letterbox:
    """A picture as a network takes it, and where the picture lies in it.

    Attributes:
        pixels: RGB 0..1, shape (1, 3, h, w); the sides are multiples of the stride.
        scale: Pixels of it per pixel of the picture.
        left: Border on the left, in its pixels.
        top: Border above.
    """

    pixels: NDArray[np.float32]
    scale: float
    left: int
    top: int

    def to_picture(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Takes x1, y1, x2, y2 boxes back to pixels of the picture, shape (n, 4)."""
        moved: NDArray[np.float64] = boxes - np.tile((self.left, self.top), 2)
        return moved / self.scale


def letterbox(picture: Pixels, image_size: int, stride: int) -> Letterbox:
    """Scales a picture so that its longest side is `image_size`, and pads it to the stride.

    As the evaluation of a training does with a picture alone in its batch.

    Args:
        picture: BGR.
        image_size: Pixels.
        stride: Pixels.
    """
    height, width = picture.shape[:2]
    scale = image_size / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size != (width, height):
        picture = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR), np.uint8)
    width, height = (-(-side // stride) * stride for side in size)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    padded = np.full((3, height, width), BORDER_VALUE, np.float32)
    padded[:, top : top + size[1], left : left + size[0]] = picture[:, :, ::-1].transpose(2, 0, 1)
    padded /= 255
    return Letterbox(padded[None], scale, left, top)


class OnnxModel:
    """A model in memory.

    Args:
        path: An ONNX export of the trainer, with inputs of any size and without suppression.
        num_threads: Threads of one call.

    Attributes:
        model: Id of its architecture.
        class_names: Name by class index.
        image_size_px: Side of the square that it was trained with.
        stride: The sides of its input are multiples of this.
    """

    def __init__(self, path: Path, num_threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A thread that waits for the next picture must not keep a processor from others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session: Any = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        about: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.model = about["model"]
        self.class_names: list[str] = json.loads(about["class_names"])
        self.image_size_px = int(about["image_size_px"])
        self.stride = int(about["stride"])

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Asks the network.

        Args:
            pixels: RGB 0..1, shape (1, 3, h, w).

        Returns:
            Shape (4 + classes, anchors): centre x, centre y, width and height in pixels of the
            input, then a confidence per class.
        """
        (predictions,) = self._session.run(None, {_INPUT: pixels})
        return np.asarray(predictions[0], np.float32)

    def warm_up(self) -> None:
        """Asks about a square, the largest input there is, so that it takes all its memory."""
        side = -(-self.image_size_px // self.stride) * self.stride
        self.run(np.zeros((1, 3, side, side), np.float32))
