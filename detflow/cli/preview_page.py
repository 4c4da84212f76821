"""A preview as one HTML page that needs nothing else: pictures with their boxes over them."""

import base64
from collections.abc import Iterator, Sequence
from html import escape

from detflow.v1 import common_pb2, dataset_pb2, preprocess_pb2

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000")
_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; background: #fff; color: #222 }
section { margin-bottom: 2em } h2 { font-size: 1em; overflow-wrap: anywhere }
.row { display: flex; flex-wrap: wrap; gap: 12px } figure { margin: 0 }
svg { display: block; max-width: 320px; max-height: 320px; background: #ddd }
rect { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke }
"""


def preview_page(
    dataset: dataset_pb2.Dataset, preview: preprocess_pb2.PreviewVersionResponse
) -> str:
    """Renders a preview.

    Args:
        dataset: The dataset it was made of.
        preview: The preview.
    """
    counts = preview.num_images
    title = f"{escape(dataset.display_name)}: {counts.train} / {counts.val} / {counts.test} images"
    sections = "".join(_sample(sample, dataset.class_names) for sample in preview.samples)
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title} (train / val / test)</h1>"
        f"{sections}</body></html>\n"
    )


def _sample(
    sample: preprocess_pb2.PreviewVersionResponse.Sample, class_names: Sequence[str]
) -> str:
    split = common_pb2.Split.Name(sample.split).removeprefix("SPLIT_").lower()
    figures = "".join(_figure(picture, class_names) for picture in (sample.before, *sample.after))
    return (
        f"<section><h2>{escape(sample.path)} ({split})</h2>"
        f'<div class="row">{figures}</div></section>'
    )


def _figure(picture: preprocess_pb2.PreviewVersionResponse.Picture, names: Sequence[str]) -> str:
    width, height = picture.width_px, picture.height_px
    data = base64.b64encode(picture.jpeg).decode()
    boxes = "".join(
        f'<rect x="{x1:.2f}" y="{y1:.2f}" width="{x2 - x1:.2f}" height="{y2 - y1:.2f}"'
        f' stroke="{_COLOURS[class_id % len(_COLOURS)]}">'
        f"<title>{escape(names[class_id])}</title></rect>"
        for x1, y1, x2, y2, class_id in _rows(picture)
    )
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<image href="data:image/jpeg;base64,{data}" width="{width}" height="{height}"/>{boxes}'
        f"</svg><figcaption>{escape(picture.step)}, {width}x{height}</figcaption></figure>"
    )


def _rows(
    picture: preprocess_pb2.PreviewVersionResponse.Picture,
) -> Iterator[tuple[float, float, float, float, int]]:
    corners = iter(picture.boxes)
    for class_id in picture.class_ids:
        yield next(corners), next(corners), next(corners), next(corners), class_id
