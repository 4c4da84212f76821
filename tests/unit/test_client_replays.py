"""Recipes like others, and replays: read, refused, compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from detflow.client.recipes import RecipeOptions, make_recipe, override_recipe
from detflow.client.replays import Replay
from detflow.errors import InvalidArgument
from detflow.v1 import version_pb2

BASE = RecipeOptions(
    split=(60, 20, 20), grayscale=True, exact_size=(640, 480), augment=["hflip", "contrast=1.5"]
)
CHANGES = [
    RecipeOptions(),
    RecipeOptions(split=(80, 10, 10)),
    RecipeOptions(grayscale=False),
    RecipeOptions(augment=[]),
    RecipeOptions(augment=["brightness=30"], seed=7),
    RecipeOptions(stretch=True),
    RecipeOptions(group_by="prefix", group_separator="_", keep_split=True),
]


@pytest.mark.parametrize("changes", CHANGES)
def test_recipe_like_another_differs_in_the_options_given_alone(changes: RecipeOptions) -> None:
    base = make_recipe(**BASE)
    assert override_recipe(base, **changes) == make_recipe(**(BASE | changes))
    assert base == make_recipe(**BASE)


def test_longest_side_takes_the_place_of_an_exact_size() -> None:
    changed = override_recipe(make_recipe(**BASE), max_side_px=320)
    assert changed.max_side_px == 320 and not changed.HasField("exact_size")
    assert override_recipe(changed, exact_size=(64, 64)).max_side_px == 0


def document(**changes: Any) -> dict[str, Any]:
    return {
        "format": "detflow-replay/1",
        "detflow": "1.0",
        "libraries": {"opencv": "5.0"},
        "dataset": {"content_sha256": "a" * 64},
        "class_names": ["disc"],
        "recipe": {"seed": "3", "grayscale": True},
        "manifest": {"sha256": "b" * 64},
        **changes,
    }


def parsed(**changes: Any) -> Replay:
    return Replay.parse(json.dumps(document(**changes)).encode())


def test_replay_says_what_differs() -> None:
    replay = parsed()
    assert replay.recipe == version_pb2.Recipe(seed=3, grayscale=True)
    assert replay.differences(parsed(class_names=["other"])) == []  # the manifest is the same
    other = {"manifest": {"sha256": "c" * 64}}
    assert "nothing" in replay.differences(parsed(**other))[0]
    different = parsed(
        dataset={"content_sha256": "d" * 64}, libraries={"opencv": "6.0"}, detflow="2.0", **other
    )
    assert replay.differences(different) == [
        "the dataset's content is dddddddddddd, not aaaaaaaaaaaa",
        "opencv is 6.0, not 5.0",
        "detflow is 2.0, not 1.0",
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        json.dumps(document(format="detflow-replay/2")).encode(),
        json.dumps(document(recipe={"unknown": 1})).encode(),
        json.dumps(document(class_names=None)).encode(),
        json.dumps(document(dataset="x")).encode(),
    ],
)
def test_file_that_is_no_replay_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "replay.json"
    file.write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"replay\.json is no replay"):
        Replay.read(file)
    with pytest.raises(InvalidArgument, match="no replay"):
        Replay.read(tmp_path)
