"""How the statistics of a dataset and the leak report of a version are drawn."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from detflow.cli import output
from detflow.v1 import common_pb2, dataset_pb2, preprocess_pb2, version_pb2

_BAR_CELLS = 32
_EIGHTHS = " ▏▎▍▌▋▊▉"
_MAX_CLASSES = 40
_MAX_IMAGE_SIZES = 8
_MAX_EXAMPLES = 3
_MAX_GROUPS = 10
_Suspicion = dataset_pb2.DatasetStatistics.Suspicion
_SUSPICIONS = {
    _Suspicion.DUPLICATE_IMAGE: "images with the same bytes as others",
    _Suspicion.NEAR_DUPLICATE_IMAGE: "images that look like others",
    _Suspicion.TINY_BOX: "boxes with a side of less than 3 px",
    _Suspicion.BOX_COVERS_IMAGE: "boxes that cover their image",
    _Suspicion.DUPLICATE_BOX: "boxes in the place of another one of their class",
    _Suspicion.UNLABELLED_IMAGE: "images without boxes",
    _Suspicion.CLASS_WITHOUT_BOXES: "classes without boxes",
}
_GROUPS = {
    version_pb2.GROUP_BY_NEAR_DUPLICATES: "images that look the same",
    version_pb2.GROUP_BY_NOTHING: "images that look the same",
    version_pb2.GROUP_BY_FOLDER: "images of one folder",
    version_pb2.GROUP_BY_NAME_PREFIX: "images whose names begin alike",
}


def say_statistics(statistics: dataset_pb2.DatasetStatistics) -> None:
    """Draws the statistics of a dataset."""
    output.say(
        f"{statistics.num_images} images ({statistics.num_background_images} without boxes),"
        f" {statistics.num_boxes} boxes, {len(statistics.classes)} classes"
    )
    _draw(
        ("CLASS", "IMAGES", "BOXES"),
        [
            ((counted.class_name, f"{counted.num_images}"), counted.num_boxes)
            for counted in statistics.classes[:_MAX_CLASSES]
        ],
        num_more=len(statistics.classes) - _MAX_CLASSES,
    )
    _draw(
        ("IMAGE SIZE", "IMAGES"),
        [
            ((f"{size.width_px} x {size.height_px} px",), size.num_images)
            for size in statistics.image_sizes[:_MAX_IMAGE_SIZES]
        ],
        num_more=statistics.num_image_sizes - _MAX_IMAGE_SIZES,
    )
    _draw(("BOXES PER IMAGE", "IMAGES"), _whole_bins(statistics.boxes_per_image))
    _draw(("SIDE OF BOX / IMAGE", "BOXES"), _bins(statistics.box_sizes, percent=True))
    _draw(("WIDTH / HEIGHT", "BOXES"), _bins(statistics.box_aspect_ratios))
    names = ("small (below 32 x 32 px)", "medium", "large (from 96 x 96 px)")
    _draw(
        ("SIZE BY COCO", "BOXES"),
        [((name,), n) for name, n in zip(names, statistics.num_boxes_by_coco_size, strict=False)],
    )
    if statistics.suspicions:
        output.say("\nWORTH A LOOK")
    for found in statistics.suspicions:
        output.say(f"{found.num_total} {_SUSPICIONS.get(found.kind, 'other things')}:")
        for example in found.examples[:_MAX_EXAMPLES]:
            output.say(f"  {output.printable(example)}")
        if len(found.examples) > _MAX_EXAMPLES:
            output.say("  ...")


def say_leaks(report: preprocess_pb2.LeakReport, class_names: Sequence[str]) -> None:
    """Draws the leak report of a version."""
    sources = report.num_sources
    output.say_fields(
        {
            "images": f"{sources.train}/{sources.val}/{sources.test} (train/val/test),"
            f" {report.num_augmented_copies} copies of those in train",
            "belong together": f"{report.num_grouped_images} images in"
            f" {_groups(report.num_groups)} of {_GROUPS.get(report.group_by, 'images')}",
            "leaks": f"{_groups(report.num_leaking_groups)} in more than one split"
            if report.num_leaking_groups
            else "none found",
        }
    )
    output.say()
    parts = zip(class_names, report.num_boxes_by_class, strict=False)
    output.say_table(
        ("CLASS", "TRAIN", "VAL", "TEST"),
        [(name, *_shares(counts)) for name, counts in parts],
        empty="no classes",
    )
    for group in report.groups[:_MAX_GROUPS]:
        split = "LEAK"
        if group.split:
            split = common_pb2.Split.Name(group.split).removeprefix("SPLIT_").lower()
        output.say(f"\n{split}: {group.num_images} images")
        for path in group.paths:
            output.say(f"  {output.printable(path)}")
    if report.num_groups > _MAX_GROUPS:
        output.say(f"\nand {report.num_groups - _MAX_GROUPS} more groups; --json lists 100")


def _groups(count: int) -> str:
    return "1 group" if count == 1 else f"{count} groups"


def _shares(counts: version_pb2.SplitCounts) -> Iterable[str]:
    total = counts.train + counts.val + counts.test
    for count in (counts.train, counts.val, counts.test):
        yield f"{count} ({100 * count / total:.1f}%)" if total else "0"


def _whole_bins(
    histogram: dataset_pb2.DatasetStatistics.Histogram,
) -> list[tuple[tuple[str], int]]:
    """Names bins of whole numbers by the first and last number in them."""
    bins = zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
    return [
        ((f"{low:.0f}" if high - low == 1 else f"{low:.0f} - {high - 1:.0f}",), count)
        for low, high, count in bins
    ]


def _bins(
    histogram: dataset_pb2.DatasetStatistics.Histogram, *, percent: bool = False
) -> list[tuple[tuple[str], int]]:
    def edge(value: float) -> str:
        return f"{100 * value:.0f} %" if percent else f"{value:.3g}"

    bins = zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
    named = [((f"{edge(low)} - {edge(high)}",), count) for low, high, count in bins]
    filled = [index for index, (_, count) in enumerate(named) if count]
    return named[filled[0] : filled[-1] + 1] if filled else []


def _draw(
    header: Sequence[str], rows: Sequence[tuple[tuple[str, ...], int]], *, num_more: int = 0
) -> None:
    """Draws rows of names and a count, with a bar for the count; `header` names all but the bar."""
    if not rows:
        return
    most = max(count for _, count in rows) or 1
    table = Table(box=None, pad_edge=False, show_header=True, header_style="")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    table.add_column("")
    for names, count in rows:
        cells = (Text(output.printable(name)) for name in names)
        table.add_row(*cells, f"{count}", _bar(count / most))
    output.say()
    Console(highlight=False).print(table)
    if num_more > 0:
        output.say(f"and {num_more} more")


def _bar(share: float) -> Text:
    """Draws a bar of blocks, to an eighth of a cell; what is there is always seen."""
    eighths = max(round(share * _BAR_CELLS * 8), share > 0)
    full, rest = divmod(eighths, 8)
    return Text("█" * full + (_EIGHTHS[rest] if rest else ""))
