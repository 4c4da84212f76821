"""Recipes as a user writes them, and as words."""

from collections.abc import Sequence
from typing import TypedDict, Unpack

from google.protobuf.field_mask_pb2 import FieldMask

from detflow.errors import InvalidArgument
from detflow.v1 import version_pb2

AUGMENTATIONS = {
    "hflip": version_pb2.AUGMENTATION_FLIP_LEFT_RIGHT,
    "vflip": version_pb2.AUGMENTATION_FLIP_UP_DOWN,
    "rot90": version_pb2.AUGMENTATION_ROTATE_90,
    "rot180": version_pb2.AUGMENTATION_ROTATE_180,
    "rot270": version_pb2.AUGMENTATION_ROTATE_270,
    "gray": version_pb2.AUGMENTATION_GRAYSCALE,
}
"""Short names of the augmentations that need no number."""

CHOICES = f"{', '.join(AUGMENTATIONS)}, brightness=-90..90, contrast=0..3"
"""What an augmentation may be, for messages."""

GROUPS = {
    "looks": version_pb2.GROUP_BY_NEAR_DUPLICATES,
    "nothing": version_pb2.GROUP_BY_NOTHING,
    "folder": version_pb2.GROUP_BY_FOLDER,
    "prefix": version_pb2.GROUP_BY_NAME_PREFIX,
}
"""Short names of what keeps images on one side of the split."""


_FIELDS = {
    "split": ("split",),
    "keep_split": ("keep_existing_split",),
    "group_by": ("group_by", "group_separator"),
    "group_separator": ("group_separator",),
    "seed": ("seed",),
    "max_side_px": ("max_side_px", "exact_size"),
    "exact_size": ("max_side_px", "exact_size"),
    "stretch": ("exact_size",),
    "grayscale": ("grayscale",),
    "augment": ("augmentations", "brightness", "contrast"),
}
"""By option, the fields of a recipe that it decides."""


class RecipeOptions(TypedDict, total=False):
    """What a recipe is made of; what is left out has its default.

    Attributes:
        split: Percent of training, validation and test images; 70, 20, 10.
        keep_split: Keep the splits that the dataset's archive had.
        group_by: What stays on one side of the split, by the short names of `GROUPS`; "looks".
        group_separator: With "prefix": part of file names that ends the name of a group.
        seed: Seed of the split; 0.
        max_side_px: Longest side of the images, in pixels; 0 keeps the size.
        exact_size: Width and height of all images, in pixels, instead of a longest side.
        stretch: Stretch images of another shape to the exact size instead of adding a border.
        grayscale: Make every image gray.
        augment: Copies of every training image: short names of `AUGMENTATIONS`, "brightness=30"
            (percent of the range, -90..90) or "contrast=1.5" (0..3).
    """

    split: tuple[int, int, int]
    keep_split: bool
    group_by: str
    group_separator: str
    seed: int
    max_side_px: int
    exact_size: tuple[int, int] | None
    stretch: bool
    grayscale: bool
    augment: Sequence[str]


def make_recipe(**options: Unpack[RecipeOptions]) -> version_pb2.Recipe:
    """Makes a recipe.

    Raises:
        InvalidArgument: UNKNOWN_AUGMENTATION or UNKNOWN_GROUP.
    """
    train, val, test = options.get("split", (70, 20, 10))
    group_by = options.get("group_by", "looks")
    if group_by not in GROUPS:
        raise InvalidArgument(
            f"images cannot be grouped by {group_by!r}: choose from {', '.join(GROUPS)}",
            reason="UNKNOWN_GROUP",
        )
    recipe = version_pb2.Recipe(
        split=version_pb2.SplitRatio(train=train, val=val, test=test),
        keep_existing_split=options.get("keep_split", False),
        group_by=GROUPS[group_by],
        group_separator=options.get("group_separator", ""),
        seed=options.get("seed", 0),
        max_side_px=options.get("max_side_px", 0),
        grayscale=options.get("grayscale", False),
    )
    if size := options.get("exact_size"):
        stretched = options.get("stretch", False)
        recipe.exact_size.width_px, recipe.exact_size.height_px = size
        recipe.exact_size.fit = (
            version_pb2.ExactSize.FIT_STRETCH if stretched else version_pb2.ExactSize.FIT_LETTERBOX
        )
    for text in options.get("augment", ()):
        _add_augmentation(recipe, text)
    return recipe


def override_recipe(
    base: version_pb2.Recipe, **options: Unpack[RecipeOptions]
) -> version_pb2.Recipe:
    """Makes a recipe like another one but for the options that are given.

    Raises:
        InvalidArgument: UNKNOWN_AUGMENTATION or UNKNOWN_GROUP.
    """
    if "stretch" in options and base.HasField("exact_size"):
        options.setdefault("exact_size", (base.exact_size.width_px, base.exact_size.height_px))
    recipe = version_pb2.Recipe()
    recipe.CopyFrom(base)
    fields = [field for option in options for field in _FIELDS[option]]
    FieldMask(paths=fields).MergeMessage(
        make_recipe(**options), recipe, replace_message_field=True, replace_repeated_field=True
    )
    return recipe


def describe_recipe(recipe: version_pb2.Recipe) -> list[str]:
    """Says in words what a recipe does to the images, in order."""
    short = {number: name for name, number in AUGMENTATIONS.items()}
    size = recipe.exact_size
    steps = [f"longest side {recipe.max_side_px} px"] if recipe.max_side_px else []
    if recipe.HasField("exact_size"):
        stretched = size.fit == version_pb2.ExactSize.FIT_STRETCH
        how = "stretched" if stretched else "letterboxed"
        steps.append(f"{size.width_px}x{size.height_px} px, {how}")
    steps += ["grayscale"] if recipe.grayscale else []
    steps += [short[number] for number in recipe.augmentations]
    steps += [f"brightness={value:+d}" for value in recipe.brightness]
    steps += [f"contrast={value:g}" for value in recipe.contrast]
    return steps


def _add_augmentation(recipe: version_pb2.Recipe, text: str) -> None:
    name, _, amount = text.partition("=")
    try:
        if name == "brightness":
            recipe.brightness.append(int(amount))
        elif name == "contrast":
            recipe.contrast.append(float(amount))
        else:
            recipe.augmentations.append(AUGMENTATIONS[text])
    except (KeyError, ValueError) as error:
        raise InvalidArgument(
            f"unknown augmentation {text!r}: choose from {CHOICES}", reason="UNKNOWN_AUGMENTATION"
        ) from error
