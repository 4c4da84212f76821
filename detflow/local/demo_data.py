"""Labelled images made on the spot: coloured shapes on textured backgrounds."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

CLASS_NAMES = ("circle", "square", "triangle")
SIDE_PX = 160

_MIN_SIZE_PX = 28
_MAX_SIZE_PX = 68
_MAX_SHAPES = 4
_MAX_OVERLAP = 0.05
_JPEG_QUALITY = 92

_Image = NDArray[np.uint8]
_Box = tuple[float, float, float, float]


def write_dataset(folder: Path, num_images: int = 240, seed: int = 0) -> None:
    """Writes a data set in YOLO layout: images/, labels/ and data.yaml.

    Each image is 160 x 160 px and holds one to four shapes that hardly overlap. The same
    arguments give the same bytes.

    Args:
        folder: Where to write; made if it is not there.
        num_images: How many images.
        seed: Seed of everything random.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "labels").mkdir(exist_ok=True)
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(CLASS_NAMES))
    (folder / "data.yaml").write_text(f"names:\n{names}")
    for number in range(num_images):
        # A generator per image: more images leave the first ones as they are.
        image, rows = _make_image(np.random.default_rng([seed, number]))
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1]
        (folder / "images" / f"shapes-{number:04}.jpg").write_bytes(encoded.tobytes())
        (folder / "labels" / f"shapes-{number:04}.txt").write_text("".join(rows))


def _make_image(random: np.random.Generator) -> tuple[_Image, list[str]]:
    """Returns a BGR image of shape (160, 160, 3) and its label rows "class cx cy w h" in 0..1."""
    image = _background(random)
    boxes: list[_Box] = []
    rows: list[str] = []
    num_shapes = int(random.integers(1, _MAX_SHAPES + 1))
    for _ in range(20 * num_shapes):
        if len(boxes) == num_shapes:
            break
        size = float(random.uniform(_MIN_SIZE_PX, _MAX_SIZE_PX))
        cx, cy = random.uniform(size / 2 + 1, SIDE_PX - size / 2 - 1, size=2)
        class_index = int(random.integers(len(CLASS_NAMES)))
        outline = _outline(class_index, float(cx), float(cy), size)
        low, high = outline.min(axis=0), outline.max(axis=0)
        box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
        if any(_overlap(box, other) > _MAX_OVERLAP for other in boxes):
            continue
        _draw(image, outline, random)
        boxes.append(box)
        x1, y1, x2, y2 = (value / SIDE_PX for value in box)
        rows.append(
            f"{class_index} {(x1 + x2) / 2:.6f} {(y1 + y2) / 2:.6f} {x2 - x1:.6f} {y2 - y1:.6f}\n"
        )
    return image, rows


def _background(random: np.random.Generator) -> _Image:
    """Returns clouds of one colour with grain, never at the ends of the range."""
    coarse = random.uniform(-45, 45, size=(6, 6, 1)).astype(np.float32)
    clouds = cv2.resize(coarse, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_CUBIC)[:, :, None]
    grain = random.normal(0, 9, size=(SIDE_PX, SIDE_PX, 3)).astype(np.float32)
    colour = random.uniform(70, 185, size=3).astype(np.float32)
    image: _Image = np.clip(colour + clouds + grain, 0, 255).astype(np.uint8)
    return image


def _outline(class_index: int, cx: float, cy: float, size: float) -> NDArray[np.float32]:
    """Returns the outline as (n, 2) points in px; a shape is as wide as it is high."""
    half = size / 2
    if CLASS_NAMES[class_index] == "circle":
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        points = np.stack([cx + half * np.cos(angles), cy + half * np.sin(angles)], axis=1)
    elif CLASS_NAMES[class_index] == "square":
        corners = [[-half, -half], [half, -half], [half, half], [-half, half]]
        points = np.array(corners) + np.array([cx, cy])
    else:
        points = np.array([[0, -half], [half, half], [-half, half]]) + np.array([cx, cy])
    return points.astype(np.float32)


def _draw(image: _Image, outline: NDArray[np.float32], random: np.random.Generator) -> None:
    """Fills the outline with a colour that stands out, and edges it."""
    x, y = outline.mean(axis=0).astype(int)
    under = image[y, x].astype(float)
    colour = under
    while np.abs(colour - under).sum() < 200:
        colour = random.uniform(0, 255, size=3)
    points = np.round(outline * 16).astype(np.int32)[None]
    fill, edge = tuple(map(float, colour)), tuple(map(float, colour * 0.6))
    cv2.fillPoly(image, [points[0]], fill, lineType=cv2.LINE_AA, shift=4)
    cv2.polylines(image, [points[0]], True, edge, 1, lineType=cv2.LINE_AA, shift=4)


def _overlap(one: _Box, other: _Box) -> float:
    """Returns the intersection over union of two x1, y1, x2, y2 boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)
