"""What became of every detection and every ground-truth box of a split: what all analysis reads.

Measuring writes it once beside the figures, as one object; what is asked later about thresholds,
confusions, errors, single images and comparisons is answered from it, without matching again.
That one matching serves every confidence threshold: it goes from the most confident detection down,
so what lies below a threshold changes nothing above it.

Array shapes are named by suffix: I images, N detections, M ground-truth boxes.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from detflow.errors import DataLoss

NUM_THRESHOLDS = 10
"""IoU thresholds 0.50, 0.55 to 0.95; bit t of `right_N` and `ignored_N` is that of 0.5 + 0.05 t."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matches:
    """Detections and ground-truth boxes of a split, and how they meet at IoU 0.5.

    Detections are sorted by image, then by falling confidence, equal ones in the order of the file;
    boxes by image, then in the order of the ground truth. Boxes are x1, y1, x2, y2 in pixels of the
    bundle's image.

    Attributes:
        class_names: Name by class index.
        paths: Path of each image in its dataset.
        id_I: Id of each image in the split, increasing.
        size_I2: Width and height of each image in pixels.
        image_N: Image of each detection: its position among the images.
        class_N: Class index of each detection.
        confidence_N: 0..1.
        box_N4: Where it is.
        counted_N: It counts: neither in a crowd region nor beyond the 100th of its image and class.
        truth_N: The box it is right about, or -1.
        overlap_N: The box that `truth_N` names or, of a wrong one, that its error is about: of its
            class if LOCALIZATION or DUPLICATE, of another if CLASS or BOTH, and the box that it
            overlaps most if BACKGROUND; -1 for none.
        iou_N: IoU with that box; 0 for none.
        error_N: `domain.ErrorKind` of what is wrong with it; 0 if it is right or does not count.
        right_N: Bit t: it is right at IoU threshold t.
        ignored_N: Bit t: it does not count at IoU threshold t; all bits beyond the 100th.
        image_M: Image of each box.
        class_M: Class index of each box.
        box_M4: Where it is.
        crowd_M: It is a crowd region: neither to be found nor counted.
        detection_M: The detection that is right about it, or -1.
        explained_M: Confidence of the most confident detection whose error (CLASS or LOCALIZATION)
            explains that it was not found; -1 if there is none.
    """

    class_names: tuple[str, ...]
    paths: tuple[str, ...]
    id_I: npt.NDArray[np.int32]
    size_I2: npt.NDArray[np.int32]
    image_N: npt.NDArray[np.int32]
    class_N: npt.NDArray[np.int32]
    confidence_N: npt.NDArray[np.float32]
    box_N4: npt.NDArray[np.float32]
    counted_N: npt.NDArray[np.bool_]
    truth_N: npt.NDArray[np.int32]
    overlap_N: npt.NDArray[np.int32]
    iou_N: npt.NDArray[np.float32]
    error_N: npt.NDArray[np.int8]
    right_N: npt.NDArray[np.uint16]
    ignored_N: npt.NDArray[np.uint16]
    image_M: npt.NDArray[np.int32]
    class_M: npt.NDArray[np.int32]
    box_M4: npt.NDArray[np.float64]
    crowd_M: npt.NDArray[np.bool_]
    detection_M: npt.NDArray[np.int32]
    explained_M: npt.NDArray[np.float32]

    @property
    def num_bytes(self) -> int:
        """Memory that the arrays take."""
        arrays: int = sum(getattr(self, name).nbytes for name in _ARRAYS)
        return arrays + 100 * len(self.paths)

    def to_bytes(self) -> bytes:
        """Writes it as an uncompressed npz; `from_bytes` reads it."""
        words = json.dumps([self.class_names, self.paths]).encode()
        file = io.BytesIO()
        np.savez(
            file,
            allow_pickle=False,
            words=np.frombuffer(words, np.uint8),
            **{name: getattr(self, name) for name in _ARRAYS},
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Matches:
        """Reads what `to_bytes` wrote.

        Raises:
            DataLoss: BAD_MATCHES: it is something else.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as content:
                class_names, paths = json.loads(content["words"].tobytes())
                arrays = {name: content[name] for name in _ARRAYS}
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise DataLoss(
                f"the matches of an evaluation cannot be read ({error}); resume the training to"
                " measure it again",
                reason="BAD_MATCHES",
            ) from error
        return cls(class_names=tuple(class_names), paths=tuple(paths), **arrays)


_ARRAYS = tuple(one.name for one in fields(Matches) if one.name not in ("class_names", "paths"))
