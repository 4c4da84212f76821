"""Recipes of versions: what is meant where a recipe does not say."""

from __future__ import annotations

from detflow.v1 import version_pb2

_DEFAULT_SPLIT = version_pb2.SplitRatio(train=70, val=20, test=10)


def resolve_recipe(recipe: version_pb2.Recipe) -> version_pb2.Recipe:
    """Fills in the defaults of a recipe: shares of 70/20/10, near duplicates kept together.

    What a version was made by can be read from its recipe for ever, whatever the defaults become.
    """
    resolved = version_pb2.Recipe()
    resolved.CopyFrom(recipe)
    if not resolved.HasField("split"):
        resolved.split.CopyFrom(_DEFAULT_SPLIT)
    resolved.group_by = resolved.group_by or version_pb2.GROUP_BY_NEAR_DUPLICATES
    if resolved.HasField("exact_size"):
        resolved.exact_size.fit = resolved.exact_size.fit or version_pb2.ExactSize.FIT_LETTERBOX
    return resolved
