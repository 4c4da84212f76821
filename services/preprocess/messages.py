"""Domain objects to protobuf messages and back."""

from __future__ import annotations

from detflow.errors import (
    DetflowError,
    InvalidArgument,
    ResourceExhausted,
    Violation,
)
from detflow.resize import Resize
from detflow.times import timestamp
from detflow.v1 import common_pb2, dataset_pb2, preprocess_pb2, version_pb2
from services.preprocess.augment import ORIGINAL, Augmentation, Copy
from services.preprocess.bundle import Transform
from services.preprocess.domain import (
    LIMIT_REASONS,
    Dataset,
    Preprocessing,
    Problem,
    ProblemList,
    Upload,
    UploadState,
)
from services.preprocess.formats import Format

_FORMATS = {
    Format.YOLO: dataset_pb2.DATASET_FORMAT_YOLO,
    Format.VOC: dataset_pb2.DATASET_FORMAT_VOC,
    Format.COCO: dataset_pb2.DATASET_FORMAT_COCO,
}
_AUGMENTATIONS = {
    version_pb2.AUGMENTATION_FLIP_LEFT_RIGHT: Augmentation.FLIP_LEFT_RIGHT,
    version_pb2.AUGMENTATION_FLIP_UP_DOWN: Augmentation.FLIP_UP_DOWN,
    version_pb2.AUGMENTATION_ROTATE_90: Augmentation.ROTATE_90,
    version_pb2.AUGMENTATION_ROTATE_180: Augmentation.ROTATE_180,
    version_pb2.AUGMENTATION_ROTATE_270: Augmentation.ROTATE_270,
    version_pb2.AUGMENTATION_GRAYSCALE: Augmentation.GRAYSCALE,
}


def upload_message(upload: Upload) -> dataset_pb2.Upload:
    """Renders an upload."""
    return dataset_pb2.Upload(
        name=upload.name,
        size_bytes=upload.size_bytes or 0,
        sha256=upload.sha256,
        create_time=timestamp(upload.create_time),
        state=dataset_pb2.Upload.State.Value(upload.state),
        committed_bytes=upload.committed_bytes,
        expire_time=timestamp(upload.expire_time)
        if upload.state is UploadState.RECEIVING
        else None,
    )


def dataset_message(dataset: Dataset) -> dataset_pb2.Dataset:
    """Renders a dataset."""
    return dataset_pb2.Dataset(
        name=dataset.name,
        display_name=dataset.display_name,
        state=dataset_pb2.Dataset.State.Value(dataset.state),
        format=_FORMATS[Format(dataset.format)]
        if dataset.format
        else dataset_pb2.DATASET_FORMAT_UNSPECIFIED,
        class_names=dataset.class_names,
        num_images=dataset.num_images,
        num_boxes=dataset.num_boxes,
        num_background_images=dataset.num_background_images,
        num_boxes_by_class=dataset.num_boxes_by_class,
        skipped=[problem_message(problem) for problem in dataset.skipped],
        num_skipped=dataset.num_skipped,
        content_sha256=dataset.content_sha256,
        existing_split=_split_counts(dataset.existing_split),
        num_crowd_boxes=dataset.num_crowd_boxes,
        failure=_failure(dataset.failure),
        create_time=timestamp(dataset.create_time),
        import_time=timestamp(dataset.import_time),
        source_url=dataset.source_url,
    )


def preprocessing_message(preprocessing: Preprocessing) -> preprocess_pb2.Preprocessing:
    """Renders a preprocessing."""
    return preprocess_pb2.Preprocessing(
        version=preprocessing.version_name,
        state=preprocess_pb2.Preprocessing.State.Value(preprocessing.state),
        revision=preprocessing.revision,
        num_images=_split_counts(preprocessing.num_images),
        manifest=common_pb2.StoredObject.FromString(preprocessing.manifest)
        if preprocessing.manifest
        else None,
        failure=_failure(preprocessing.failure),
        create_time=timestamp(preprocessing.create_time),
        end_time=timestamp(preprocessing.end_time),
    )


def wanted_format(value: int) -> Format | None:
    """Reads the layout that a request names; None means detect it."""
    return next((name for name, number in _FORMATS.items() if number == value), None)


def transform_of(recipe: version_pb2.Recipe, split: str) -> Transform:
    """Reads what a recipe does to the images of a split; only training images are augmented."""
    copies = [ORIGINAL]
    if split == "train":
        copies += [Copy(_AUGMENTATIONS[value]) for value in recipe.augmentations]
        copies += [Copy(Augmentation.BRIGHTNESS, value) for value in recipe.brightness]
        copies += [Copy(Augmentation.CONTRAST, value) for value in recipe.contrast]
    return Transform(
        resize=Resize.of(recipe),
        grayscale=recipe.grayscale,
        copies=tuple(copies),
    )


def num_copies(recipe: version_pb2.Recipe, split: str) -> int:
    """Returns how many images a recipe makes of each image of a split, itself included."""
    return len(transform_of(recipe, split).copies)


def refusal(problems: ProblemList, hint: str = "") -> DetflowError:
    """Makes the error that says what is wrong with an archive.

    Args:
        problems: At least one; code and reason are those of the first.
        hint: What the user could do, appended to the message.
    """
    kept = problems.first()
    first = kept[0]
    more = f" (and {problems.total - 1} more)" if problems.total > 1 else ""
    cls = ResourceExhausted if first.reason in LIMIT_REASONS else InvalidArgument
    return cls(
        f"{first.where}: {first.description}{more}{hint}",
        reason=first.reason,
        violations=[Violation(p.where, p.reason, p.description) for p in kept],
        total=problems.total,
    )


def problem_message(problem: Problem) -> common_pb2.Problem:
    """Renders a problem."""
    return common_pb2.Problem(
        field=problem.where, reason=problem.reason, description=problem.description
    )


def _split_counts(counts: tuple[int, int, int] | None) -> version_pb2.SplitCounts | None:
    if counts is None:
        return None
    train, val, test = counts
    return version_pb2.SplitCounts(train=train, val=val, test=test)


def _failure(data: bytes | None) -> common_pb2.Failure | None:
    return common_pb2.Failure.FromString(data) if data else None
