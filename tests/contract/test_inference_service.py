"""Inference results and their pictures through a real server, measured as after a training."""

import asyncio
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import pytest

from detflow import channels, names
from detflow.errors import DataLoss, InvalidArgument, NotFound
from detflow.events import Bus
from detflow.server import Service
from detflow.store import ObjectStore
from detflow.v1 import (
    analysis_pb2,
    analysis_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    metrics_pb2,
    metrics_pb2_grpc,
)
from detflow.v1.common_pb2 import SPLIT_TEST, SPLIT_TRAIN, SPLIT_VAL, FileInfo, StoredObject
from services.metrics import inference_service
from tests.metrics_fakes import FakeTraining, Row, ground_truth, parquet
from tests.metrics_rig import serving

Stub: TypeAlias = "inference_pb2_grpc.InferenceServiceAsyncStub"  # known to type checkers only
_List = inference_pb2.ListInferenceResultsRequest
_Match = inference_pb2.Detection.Match

PATHS = ["a/세포.png", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
# Of two classes: what should be found, and what was.
BOXES = [
    (1, 0, [0.0, 0.0, 100.0, 100.0], 0),
    (2, 0, [0.0, 0.0, 100.0, 100.0], 0),
    (2, 1, [200.0, 200.0, 100.0, 100.0], 0),
    (3, 0, [0.0, 0.0, 100.0, 100.0], 0),
    (3, 1, [500.0, 0.0, 100.0, 100.0], 1),
    (5, 1, [0.0, 0.0, 100.0, 100.0], 0),
]
ROWS: list[Row] = [
    (1, 0, 0.90625, 0, 0, 100, 100),  # right
    (2, 1, 0.8125, 0, 0, 100, 100),  # of another class
    (2, 1, 0.75, 200, 200, 300, 300),  # right
    (2, 1, 0.625, 200, 200, 300, 300),  # that again
    (2, 0, 0.5, 400, 300, 440, 340),  # nothing
    (3, 0, 0.9375, 300, 300, 340, 340),  # nothing, and the box of this image is missed
    (3, 1, 0.4375, 520, 20, 580, 80),  # in a crowd
    (5, 1, 0.375, 50, 0, 150, 100),  # badly placed
]
CLASS, LOCALIZATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(1, 7)


def jpeg(number: int) -> bytes:
    """A gray picture with some texture."""
    pixels = np.random.default_rng(number).integers(100, 140, (480, 640, 3), np.uint8)
    return cv2.imencode(".jpg", cv2.blur(pixels, (9, 9)))[1].tobytes()


def put_bundle(store: ObjectStore) -> StoredObject:
    """Stores a bundle of five validation images and a test image; returns its manifest."""
    truths = {"val": ground_truth(5, 2, BOXES), "test": ground_truth(1, 2, [])}
    for image, path in zip(truths["val"]["images"], PATHS, strict=True):
        image["source"] = {"path": path, "sha256": "", "augmentation": "original"}
    splits: dict[str, Any] = {}
    for split, truth in truths.items():
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for image in truth["images"]:
                member, data = tarfile.TarInfo(image["file_name"]), jpeg(image["id"])
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        shard = store.put(f"bundles/shards/{split}.tar", file.getvalue())
        stored = store.put(f"bundles/ground-truth/{split}.json", json.dumps(truth).encode())
        num_images = len(truth["images"])
        splits[split] = {
            "ground_truth": entry(stored),
            "num_images": num_images,
            "shards": [entry(shard) | {"num_images": num_images}],
        }
    manifest = json.dumps({"format": "detflow-bundle/1", "splits": splits}).encode()
    return store.put("bundles/manifests/m.json", manifest)


def entry(obj: StoredObject) -> dict[str, Any]:
    return {"key": obj.key, "size_bytes": obj.size_bytes, "sha256": obj.sha256}


@pytest.fixture
async def service(
    make_database_url: Callable[[str], Awaitable[str]],
    nats_url: str,
    bus: Bus,
    store: ObjectStore,
    tmp_path: Path,
) -> AsyncIterator[Service]:
    url = await make_database_url("metrics")
    async with serving(url, nats_url, store, tmp_path) as service:
        yield service


@pytest.fixture
async def training(service: Service, bus: Bus, store: ObjectStore) -> str:
    """Name of a training whose splits are measured."""
    training = FakeTraining(bus, names.new_id())
    await training.run()
    val = store.put("trainings/t/val.parquet", parquet(ROWS))
    test = store.put("trainings/t/test.parquet", parquet([]))
    await training.predictions(put_bundle(store), val, test)
    async with channels.channel(service.address) as channel, asyncio.timeout(30):
        request = metrics_pb2.WatchMetricsRequest(training=training.name)
        async for _ in metrics_pb2_grpc.MetricsServiceStub(channel).WatchMetrics(request):
            pass  # it ends when both splits are measured
    return training.name


@pytest.fixture
async def stub(service: Service) -> AsyncIterator[Stub]:
    async with channels.channel(service.address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


async def listed(stub: Stub, training: str, **fields: Any) -> list[int]:
    """Ids of the images of the first page; of all detections unless a threshold is given."""
    request = _List(parent=training, **{"confidence_threshold": 0.0} | fields)
    with channels.translate():
        response = await stub.ListInferenceResults(request)
    assert response.total_size >= len(response.inference_results)
    return [int(one.name.rsplit("-", 1)[1]) for one in response.inference_results]


async def test_results_come_worst_first_with_what_became_of_each_box(
    stub: Stub, training: str
) -> None:
    assert await listed(stub, training) == [2, 3, 5, 1, 4]
    assert await listed(stub, training, order_by=_List.IMAGE) == [1, 2, 3, 4, 5]
    assert await listed(stub, training, split=SPLIT_TEST) == [1]
    name = f"{training}/inferenceResults/val-2"
    result = await stub.GetInferenceResult(
        inference_pb2.GetInferenceResultRequest(name=name, confidence_threshold=0.0)
    )
    assert (result.name, result.split, result.image_path) == (name, SPLIT_VAL, "b.jpg")
    assert (result.width_px, result.height_px) == (640, 480)
    assert [
        (d.class_name, d.confidence, d.match, d.error_kind, d.iou) for d in result.detections
    ] == [
        ("class 1", 0.8125, _Match.FALSE_POSITIVE, CLASS, 1.0),
        ("class 1", 0.75, _Match.TRUE_POSITIVE, 0, 1.0),
        ("class 1", 0.625, _Match.FALSE_POSITIVE, DUPLICATE, 1.0),
        ("class 0", 0.5, _Match.FALSE_POSITIVE, BACKGROUND, 0.0),
    ]
    assert [d.ground_truth if d.HasField("ground_truth") else None for d in result.detections] == [
        0,
        1,
        1,
        None,
    ]
    box = result.detections[3].box
    assert (box.x1, box.y1, box.x2, box.y2) == (400, 300, 440, 340)
    assert [
        (g.class_name, g.crowd, g.found, g.detection if g.HasField("detection") else None)
        for g in result.ground_truths
    ] == [("class 0", False, False, None), ("class 1", False, True, 1)]
    assert [g.error_kind for g in result.ground_truths] == [0, 0]  # a class error explains it
    counts = (result.num_true_positives, result.num_false_positives, result.num_false_negatives)
    assert counts == (1, 3, 1)


async def test_threshold_decides_what_counts(stub: Stub, training: str) -> None:
    async def get(image: int, threshold: float | None) -> inference_pb2.InferenceResult:
        return await stub.GetInferenceResult(
            inference_pb2.GetInferenceResultRequest(
                name=f"{training}/inferenceResults/val-{image}", confidence_threshold=threshold
            )
        )

    exact = await get(2, 0.75)
    assert [d.confidence for d in exact.detections] == [0.8125, 0.75]
    above = await get(2, 0.8)
    assert [d.confidence for d in above.detections] == [0.8125]
    assert [(g.found, g.error_kind) for g in above.ground_truths] == [(False, 0), (False, MISSED)]
    highest = await get(2, 1.0)
    assert not highest.detections
    assert [g.error_kind for g in highest.ground_truths] == [MISSED, MISSED]
    crowd = await get(3, 0.0)
    assert [d.match for d in crowd.detections] == [_Match.FALSE_POSITIVE, _Match.IGNORED]
    assert [(g.crowd, g.error_kind) for g in crowd.ground_truths] == [(False, MISSED), (True, 0)]
    # The threshold with the best F1 unless stated: 3 right of 4 at 0.75, with 5 boxes.
    response = await stub.ListInferenceResults(_List(parent=training))
    assert response.confidence_threshold == 0.75
    assert len((await get(2, None)).detections) == 2


async def test_filters_narrow_the_list(
    stub: Stub, training: str, subtests: pytest.Subtests
) -> None:
    def cell(actual: str, predicted: str) -> _List.ConfusionFilter:
        return _List.ConfusionFilter(actual_class=actual, predicted_class=predicted)

    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({"class_names": ["class 1"]}, [2, 3, 5]),
        ({"class_names": ["class 0"]}, [2, 3, 1]),
        ({"class_names": ["class 0", "class 1"]}, [2, 3, 5, 1]),
        ({"class_names": ["class 0"], "confidence_threshold": 0.99}, [2, 1, 3]),  # boxes stay
        ({"error_kinds": [CLASS]}, [2]),
        ({"error_kinds": [LOCALIZATION]}, [5]),
        ({"error_kinds": [BOTH]}, []),
        ({"error_kinds": [DUPLICATE]}, [2]),
        ({"error_kinds": [BACKGROUND]}, [2, 3]),
        ({"error_kinds": [MISSED]}, [3]),
        ({"error_kinds": [MISSED], "confidence_threshold": 0.85}, [3, 2, 5]),
        ({"error_kinds": [MISSED, LOCALIZATION]}, [3, 5]),
        ({"error_kinds": [BACKGROUND], "class_names": ["class 1"]}, [2, 3]),
        ({"confusion": cell("class 0", "class 0")}, [1]),
        ({"confusion": cell("class 0", "class 1")}, [2]),
        ({"confusion": cell("class 0", "")}, [3]),
        ({"confusion": cell("", "class 0")}, [2, 3]),
        ({"confusion": cell("", "class 1")}, [2, 5]),
        ({"confusion": cell("", "class 0"), "error_kinds": [DUPLICATE]}, [2]),
    ]
    for fields, images in cases:
        with subtests.test(str(fields)):
            assert await listed(stub, training, **fields) == images


async def test_lists_agree_with_the_counts_of_the_analysis(
    service: Service, stub: Stub, training: str
) -> None:
    async with channels.channel(service.address) as channel:
        analysis = analysis_pb2_grpc.AnalysisServiceStub(channel)
        for threshold in (0.0, 0.5, 0.75, 0.9, 1.0):
            found = await analysis.AnalyzeEvaluation(
                analysis_pb2.AnalyzeEvaluationRequest(
                    name=f"{training}/evaluations/val", confidence_threshold=threshold
                )
            )
            response = await stub.ListInferenceResults(
                _List(parent=training, confidence_threshold=threshold)
            )
            for count in ("true_positives", "false_positives", "false_negatives"):
                listed_count = sum(
                    getattr(one, f"num_{count}") for one in response.inference_results
                )
                assert listed_count == getattr(found.all, f"num_{count}")
            for error in found.errors:
                kinds = [d.error_kind for one in response.inference_results for d in one.detections]
                kinds += [
                    g.error_kind for one in response.inference_results for g in one.ground_truths
                ]
                assert kinds.count(error.kind) == error.count
                is_listed = await listed(
                    stub, training, error_kinds=[error.kind], confidence_threshold=threshold
                )
                assert bool(is_listed) == bool(error.count)
            for cell in found.confusion:
                assert await listed(
                    stub,
                    training,
                    confidence_threshold=threshold,
                    confusion=_List.ConfusionFilter(
                        actual_class=cell.actual_class, predicted_class=cell.predicted_class
                    ),
                )


async def test_page_of_images_with_many_boxes_has_fewer_of_them(
    stub: Stub, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Boxes of both kinds, worst image first: 6, 4, 2, 2, 0.
    for limit, images in ((1, [2]), (6, [2]), (9, [2]), (10, [2, 3]), (14, [2, 3, 5, 1, 4])):
        monkeypatch.setattr(inference_service, "_MAX_PAGE_BOXES", limit)
        assert await listed(stub, training) == images


async def test_pages_make_the_list_and_belong_to_their_query(stub: Stub, training: str) -> None:
    token, pages = "", []
    while True:
        request = _List(parent=training, confidence_threshold=0.0, page_size=2, page_token=token)
        response = await stub.ListInferenceResults(request)
        assert response.total_size == 5
        pages.append([int(one.name.rsplit("-", 1)[1]) for one in response.inference_results])
        token = response.next_page_token
        if not token:
            break
        last = token
    assert pages == [[2, 3], [5, 1], [4]]
    assert await listed(stub, training, page_token=last, page_size=200) == [4]
    for fields in (
        {"page_token": last, "confidence_threshold": 0.5},
        {"page_token": last, "error_kinds": [CLASS]},
        {"page_token": last, "order_by": _List.IMAGE},
        {"page_token": last, "split": SPLIT_TEST},
        {"page_token": last[:-2] + ("AA" if last[-2:] != "AA" else "BB")},
        {"page_token": "x"},
    ):
        with pytest.raises(InvalidArgument) as raised:
            await listed(stub, training, **fields)
        assert raised.value.reason == "BAD_PAGE_TOKEN"


async def test_bad_requests_name_their_field(
    stub: Stub, training: str, subtests: pytest.Subtests
) -> None:
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"confidence_threshold": 2.0}, "confidence_threshold", "INVALID_FIELD"),
        ({"confidence_threshold": float("nan")}, "confidence_threshold", "INVALID_FIELD"),
        ({"split": SPLIT_TRAIN}, "split", "INVALID_FIELD"),
        ({"page_size": -1}, "page_size", "INVALID_FIELD"),
        ({"error_kinds": [0]}, "error_kinds[0]", "INVALID_FIELD"),
        ({"class_names": ["class 0", "cat"]}, "class_names[1]", "UNKNOWN_CLASS"),
        ({"confusion": _List.ConfusionFilter()}, "confusion", "EMPTY_CELL"),
        (
            {"confusion": _List.ConfusionFilter(predicted_class="cat")},
            "confusion.predicted_class",
            "UNKNOWN_CLASS",
        ),
    ]
    for fields, field, reason in cases:
        with subtests.test(field):
            with pytest.raises(InvalidArgument) as raised:
                await listed(stub, training, **fields)
            assert (raised.value.violations[0].field, raised.value.reason) == (field, reason)
            if reason == "UNKNOWN_CLASS":
                assert "class 0, class 1" in raised.value.message
    foreign = training.replace("projects/p/", "projects/q/")
    for name in (
        f"{training}/inferenceResults/val-6",
        f"{training}/inferenceResults/test-2",
        f"{foreign}/inferenceResults/val-1",
    ):
        with subtests.test(name), pytest.raises(NotFound), channels.translate():
            await stub.GetInferenceResult(inference_pb2.GetInferenceResultRequest(name=name))


async def picture(stub: Stub, training: str, image: int, **fields: Any) -> tuple[bytes, FileInfo]:
    request = inference_pb2.GetInferenceImageRequest(
        name=f"{training}/inferenceResults/val-{image}", **fields
    )
    info = FileInfo()
    parts: list[bytes] = []
    with channels.translate():
        async for chunk in stub.GetInferenceImage(request):
            if not parts:
                assert chunk.content_type == ("image/png" if fields.get("png") else "image/jpeg")
                assert chunk.extensions[0].Unpack(info)
            parts.append(chunk.data)
    data = b"".join(parts)
    assert info.size_bytes == len(data)
    assert info.inline
    return data, info


def pixels(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), np.uint8)


async def test_picture_is_the_file_itself_or_made_as_asked(stub: Stub, training: str) -> None:
    original, info = await picture(stub, training, 1)
    assert original == jpeg(1)
    assert info.file_name == "val-1-세포.jpg"
    assert info.etag == hashlib.sha256(original).hexdigest()[:32]
    assert (await picture(stub, training, 1, max_side_px=640))[0] == original

    small, _ = await picture(stub, training, 1, max_side_px=64)
    assert small[:3] == b"\xff\xd8\xff"
    assert pixels(small).shape == (48, 64, 3)
    plain, info = await picture(stub, training, 1, png=True)
    assert plain[:4] == b"\x89PNG"
    assert info.file_name == "val-1-세포.png"
    np.testing.assert_array_equal(pixels(plain), pixels(original))

    draw = {"png": True, "confidence_threshold": 0.0}
    truths, _ = await picture(stub, training, 5, draw_ground_truths=True, **draw)
    found, info = await picture(stub, training, 5, draw_detections=True, **draw)
    assert (await picture(stub, training, 5, draw_detections=True, **draw))[1].etag == info.etag
    before = pixels(jpeg(5)).astype(int)
    changed = [np.abs(pixels(one).astype(int) - before).max(axis=2) > 40 for one in (truths, found)]
    # The box from 0, 0 to 100, 100, and the one from 50, 0 to 150, 100.
    assert [mask[30:90, 98:102].any() for mask in changed] == [True, False]
    assert [mask[30:90, 148:152].any() for mask in changed] == [False, True]
    half = {**draw, "max_side_px": 320}
    small, _ = await picture(stub, training, 5, draw_detections=True, **half)
    plain, _ = await picture(stub, training, 5, **half)
    changes = np.abs(pixels(small).astype(int) - pixels(plain).astype(int)).max(axis=2) > 40
    assert changes.shape == (240, 320)
    assert changes[15:45, 73:77].any() and not changes[15:45, 100:].any()
    none, _ = await picture(stub, training, 5, draw_detections=True, png=True)  # all below 0.75
    np.testing.assert_array_equal(pixels(none), pixels(jpeg(5)))


async def test_lost_shard_is_data_loss_and_missing_image_not_found(
    stub: Stub, training: str, store: ObjectStore
) -> None:
    with pytest.raises(NotFound):
        await picture(stub, training, 6)
    store.delete("bundles/shards/val.tar")
    with pytest.raises(DataLoss) as raised:
        await picture(stub, training, 1)
    assert raised.value.metadata["key"] == "bundles/shards/val.tar"
    store.put("bundles/shards/val.tar", b"\0" * 20000)
    with pytest.raises(DataLoss):
        await picture(stub, training, 1)
    assert await listed(stub, training) == [2, 3, 5, 1, 4]  # the results need no images
