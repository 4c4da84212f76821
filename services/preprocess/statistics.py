"""Counting what a dataset holds, and finding in it what is allowed and often a mistake."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from detflow.v1.dataset_pb2 import DatasetStatistics
from services.preprocess.domain import Image
from services.preprocess.duplicates import find_duplicates
from services.preprocess.outlines import Outlines

_Suspicion = DatasetStatistics.Suspicion
_Kind = _Suspicion.Kind

BATCH = 1000
"""Images that are counted at once."""

_MAX_EXAMPLES = 20
_MAX_PATHS = 10
_MAX_IMAGE_SIZES = 100
_TINY_PX = 3
_COVERING = 0.99
_SAME_PLACE_PX = 1
_COCO_SIZES = (32**2, 96**2)
_BOXES_PER_IMAGE = (0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100, 200, 500, 1000)
_SIZE_EDGES = (0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1)
_RATIO_EDGES = (0, 0.1, 0.2, 1 / 3, 0.5, 2 / 3, 0.8, 1.25, 1.5, 2, 3, 5, 10)


class StatisticsBuilder:
    """Counts a dataset as its images come by, in the order of their positions.

    Args:
        class_names: Classes of the dataset.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self._class_names = class_names
        self._outlines = Outlines()
        self._boxes_by_class = np.zeros(len(class_names), np.int64)
        self._images_by_class = np.zeros(len(class_names), np.int64)
        self._image_sizes: Counter[tuple[int, int]] = Counter()
        self._boxes_per_image: Counter[int] = Counter()
        self._sizes = np.zeros(len(_SIZE_EDGES) - 1, np.int64)
        self._ratios = np.zeros(len(_RATIO_EDGES), np.int64)  # the last bin: beyond all edges
        self._largest_ratio = 0.0
        self._coco_sizes = np.zeros(len(_COCO_SIZES) + 1, np.int64)
        self._suspicions = {kind: _Suspicion(kind=kind) for kind in _Kind.values()[1:]}

    def add(self, images: Sequence[Image]) -> None:
        """Counts the next images; some hundreds at once are fastest."""
        for image in images:
            self._outlines.add(
                image.path,
                sha256=image.sha256,
                perceptual_hash=image.perceptual_hash,
            )
            self._image_sizes[image.width, image.height] += 1
            self._boxes_per_image[len(image.class_ids)] += 1
            if not image.class_ids:
                self._suspect(_Kind.UNLABELLED_IMAGE, [image.path])
        owners = np.repeat(np.arange(len(images)), [len(image.class_ids) for image in images])
        class_ids = np.fromiter(
            itertools.chain.from_iterable(image.class_ids for image in images), np.int64
        )
        boxes = np.fromiter(
            itertools.chain.from_iterable(image.boxes for image in images), np.float64
        ).reshape(-1, 4)
        areas = np.array([image.width * image.height for image in images], np.float64)[owners]
        self._count_boxes(owners, class_ids, boxes, areas)
        self._suspect_boxes(images, owners, class_ids, boxes, areas)

    def _count_boxes(
        self,
        owners: NDArray[np.int64],
        class_ids: NDArray[np.int64],
        boxes: NDArray[np.float64],
        image_areas: NDArray[np.float64],
    ) -> None:
        num_classes = len(self._class_names)
        self._boxes_by_class += np.bincount(class_ids, minlength=num_classes)
        in_images = np.unique(np.stack([owners, class_ids]), axis=1)[1]
        self._images_by_class += np.bincount(in_images, minlength=num_classes)
        widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        areas, ratios = widths * heights, widths / heights
        shares = np.minimum(np.sqrt(areas / image_areas), 1)
        self._sizes += np.histogram(shares, _SIZE_EDGES)[0]
        self._ratios += np.bincount(
            np.searchsorted(_RATIO_EDGES, ratios, side="right") - 1, minlength=len(self._ratios)
        )
        self._largest_ratio = max(self._largest_ratio, *ratios.tolist(), 0.0)
        self._coco_sizes += np.bincount(
            np.searchsorted(_COCO_SIZES, areas, side="right"), minlength=len(self._coco_sizes)
        )

    def _suspect_boxes(
        self,
        images: Sequence[Image],
        owners: NDArray[np.int64],
        class_ids: NDArray[np.int64],
        boxes: NDArray[np.float64],
        image_areas: NDArray[np.float64],
    ) -> None:
        sides = boxes[:, 2:] - boxes[:, :2]
        order = np.lexsort((*boxes.T[::-1], class_ids, owners))
        before, after = order[:-1], order[1:]
        repeated = (
            (owners[before] == owners[after])
            & (class_ids[before] == class_ids[after])
            & (np.abs(boxes[before] - boxes[after]).max(axis=1, initial=0) <= _SAME_PLACE_PX)
        )
        for kind, found in (
            (_Kind.TINY_BOX, np.flatnonzero(sides.min(axis=1, initial=np.inf) < _TINY_PX)),
            (
                _Kind.BOX_COVERS_IMAGE,
                np.flatnonzero(sides.prod(axis=1) >= _COVERING * image_areas),
            ),
            (_Kind.DUPLICATE_BOX, np.sort(after[repeated])),
        ):
            examples = (
                f"{images[owners[i]].path} ({', '.join(f'{v:g}' for v in boxes[i].round(1))})"
                for i in found.tolist()
            )
            self._suspect(kind, examples, num_total=len(found))

    def _suspect(self, kind: _Kind.ValueType, examples: Iterable[str], num_total: int = 1) -> None:
        suspicion = self._suspicions[kind]
        suspicion.num_total += num_total
        room = _MAX_EXAMPLES - len(suspicion.examples)
        suspicion.examples.extend(itertools.islice(examples, room))

    def finish(self) -> DatasetStatistics:
        """Returns what was counted; the name is left to the caller.

        Looks for duplicates, which takes seconds for 100,000 images.
        """
        self._suspect_duplicates()
        empty = [
            name
            for name, count in zip(self._class_names, self._boxes_by_class, strict=True)
            if not count
        ]
        self._suspect(_Kind.CLASS_WITHOUT_BOXES, empty, num_total=len(empty))
        by_frequency = sorted(self._image_sizes.items(), key=lambda item: (-item[1], item[0]))
        return DatasetStatistics(
            num_images=len(self._outlines),
            num_boxes=int(self._boxes_by_class.sum()),
            num_background_images=self._boxes_per_image[0],
            classes=[
                DatasetStatistics.ClassCount(
                    class_name=name, num_boxes=int(boxes), num_images=int(images)
                )
                for name, boxes, images in zip(
                    self._class_names, self._boxes_by_class, self._images_by_class, strict=True
                )
            ],
            image_sizes=[
                DatasetStatistics.ImageSize(width_px=width, height_px=height, num_images=count)
                for (width, height), count in by_frequency[:_MAX_IMAGE_SIZES]
            ],
            num_image_sizes=len(by_frequency),
            boxes_per_image=self._histogram_of_boxes_per_image(),
            box_sizes=_histogram(_SIZE_EDGES, self._sizes),
            box_aspect_ratios=self._histogram_of_ratios(),
            num_boxes_by_coco_size=self._coco_sizes.tolist(),
            suspicions=[found for found in self._suspicions.values() if found.num_total],
        )

    def _histogram_of_boxes_per_image(self) -> DatasetStatistics.Histogram:
        most = max(self._boxes_per_image, default=0)
        edges = [*(edge for edge in _BOXES_PER_IMAGE if edge <= most), most + 1]
        counts = np.histogram(
            [*self._boxes_per_image], edges, weights=[*self._boxes_per_image.values()]
        )[0]
        return _histogram(edges, counts)

    def _histogram_of_ratios(self) -> DatasetStatistics.Histogram:
        if self._ratios[-1]:
            return _histogram((*_RATIO_EDGES, self._largest_ratio), self._ratios)
        return _histogram(_RATIO_EDGES, self._ratios[:-1])

    def _suspect_duplicates(self) -> None:
        levels = find_duplicates(self._outlines.looks, self._outlines.contents)
        same = find_duplicates(np.full(len(self._outlines), -1), self._outlines.contents)[0]
        self._suspect_groups(_Kind.DUPLICATE_IMAGE, same, np.ones(len(same), bool))
        near = levels[-1]
        # A group whose images all have the same bytes was named above.
        several = np.zeros(len(near), bool)
        several[near[same != same[near]]] = True
        self._suspect_groups(_Kind.NEAR_DUPLICATE_IMAGE, near, several)

    def _suspect_groups(
        self, kind: _Kind.ValueType, labels: NDArray[np.int64], counted: NDArray[np.bool_]
    ) -> None:
        """Names groups of more than one image whose label is `counted`."""
        names, counts = np.unique(labels, return_counts=True)
        chosen = (counts > 1) & counted[names]
        members = np.argsort(labels, kind="stable")
        begins = np.searchsorted(labels[members], names)
        examples = (
            " = ".join(self._outlines.paths[i] for i in members[begin : begin + min(n, _MAX_PATHS)])
            + (f" = {n - _MAX_PATHS} more" if n > _MAX_PATHS else "")
            for begin, n in zip(begins[chosen].tolist(), counts[chosen].tolist(), strict=True)
        )
        self._suspect(kind, examples, num_total=int(counts[chosen].sum()))


def count_dataset(images: Sequence[Image], class_names: Sequence[str]) -> DatasetStatistics:
    """Counts a dataset that is in memory."""
    builder = StatisticsBuilder(class_names)
    for begin in range(0, len(images), BATCH):
        builder.add(images[begin : begin + BATCH])
    return builder.finish()


def _histogram(
    edges: Sequence[float], counts: NDArray[np.int64] | NDArray[np.float64]
) -> DatasetStatistics.Histogram:
    return DatasetStatistics.Histogram(edges=edges, counts=[int(count) for count in counts])
