"""Every RPC of the analysis service through a real server."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from detflow import channels
from detflow.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from detflow.server import Service
from detflow.store import ObjectStore
from detflow.v1 import analysis_pb2, analysis_pb2_grpc
from tests.metrics_fakes import Row, ground_truth
from tests.metrics_rig import put_evaluation, serving

Stub: TypeAlias = "analysis_pb2_grpc.AnalysisServiceAsyncStub"  # known to type checkers only

TRAINING = "projects/p/versions/v/trainings/t"
NAME = f"{TRAINING}/evaluations/val"

# Class 0 has boxes A, B, C; class 1 has D; class 2 has none.
TRUTH = ground_truth(
    3,
    3,
    [
        (1, 0, [0, 0, 40, 40], 0),  # A
        (1, 0, [100, 0, 40, 40], 0),  # B
        (2, 0, [0, 0, 40, 40], 0),  # C
        (2, 1, [200, 0, 40, 40], 0),  # D
    ],
)
ROWS: list[Row] = [
    (1, 0, 0.9, 0, 0, 40, 40),  # right: A
    (1, 0, 0.8, 0, 0, 40, 36),  # DUPLICATE of A
    (1, 1, 0.7, 100, 0, 140, 40),  # CLASS: on B
    (2, 0, 0.6, 0, 0, 40, 16),  # LOCALIZATION: IoU 0.4 with C
    (2, 2, 0.5, 200, 0, 240, 16),  # BOTH: IoU 0.4 with D
    (3, 0, 0.4, 0, 0, 40, 40),  # BACKGROUND: nothing there
]


@pytest.fixture
async def service(
    make_database_url: Callable[[str], Awaitable[str]],
    nats_url: str,
    store: ObjectStore,
    tmp_path: Path,
) -> AsyncIterator[Service]:
    async with serving(await make_database_url("metrics"), nats_url, store, tmp_path) as service:
        yield service


@pytest.fixture
async def stub(service: Service) -> AsyncIterator[Stub]:
    async with channels.channel(service.address) as channel:
        yield analysis_pb2_grpc.AnalysisServiceStub(channel)


async def analyze(stub: Stub, threshold: float | None = None) -> analysis_pb2.EvaluationAnalysis:
    with channels.translate():
        return await stub.AnalyzeEvaluation(
            analysis_pb2.AnalyzeEvaluationRequest(name=NAME, confidence_threshold=threshold)
        )


async def get_curves(stub: Stub, *class_names: str) -> analysis_pb2.EvaluationCurves:
    with channels.translate():
        return await stub.GetEvaluationCurves(
            analysis_pb2.GetEvaluationCurvesRequest(name=NAME, class_names=class_names)
        )


def cells(analysis: analysis_pb2.EvaluationAnalysis) -> dict[tuple[str, str], int]:
    return {(c.actual_class, c.predicted_class): c.count for c in analysis.confusion}


def counts(one: analysis_pb2.EvaluationAnalysis.Counts) -> tuple[int, int, int]:
    return one.num_true_positives, one.num_false_positives, one.num_false_negatives


async def test_analysis_counts_confuses_and_explains_what_the_threshold_keeps(
    service: Service, stub: Stub, store: ObjectStore
) -> None:
    await put_evaluation(service.db, store, TRAINING, TRUTH, ROWS)
    everything = await analyze(stub, 0.0)
    assert everything.confidence_threshold == 0.0
    assert counts(everything.all) == (1, 5, 3)
    assert everything.all.precision == pytest.approx(1 / 6)
    assert everything.all.recall == pytest.approx(1 / 4)
    assert everything.all.f1 == pytest.approx(2 / 10)
    assert [(c.class_name, counts(c)) for c in everything.classes] == [
        ("class 0", (1, 3, 2)),
        ("class 1", (0, 1, 1)),
        ("class 2", (0, 1, 0)),
    ]
    assert cells(everything) == {
        ("class 0", "class 0"): 1,
        ("class 0", "class 1"): 1,
        ("class 0", ""): 1,
        ("class 1", ""): 1,
        ("", "class 0"): 3,
        ("", "class 2"): 1,
    }
    assert [(e.kind, e.count) for e in everything.errors] == [(kind, 1) for kind in range(1, 7)]
    # AP50 of class 0 is 1 up to recall 1/3, 34 of 101 levels; that of class 1 is 0. Repaired, the
    # detection on B, or the one near C, is the second right one of three up to recall 2/3.
    one_more = 33 * (2 / 3) / 101 / 2
    assert [e.map50_gain for e in everything.errors] == pytest.approx(
        # Without D class 1 has nothing left to be measured on.
        [one_more, one_more, 0.0, 0.0, 0.0, 34 / 101 / 2]
    )

    strict = await analyze(stub, 0.65)
    assert counts(strict.all) == (1, 2, 3)
    # C's detection is not kept, so nothing explains any more that C was not found.
    assert [e.count for e in strict.errors] == [1, 0, 0, 1, 0, 2]
    assert [e.map50_gain for e in strict.errors] == [e.map50_gain for e in everything.errors]
    assert counts((await analyze(stub, 0.9)).all) == (1, 0, 3)


async def test_threshold_left_out_is_the_one_with_the_best_f1(
    service: Service, stub: Stub, store: ObjectStore
) -> None:
    evaluation = await put_evaluation(service.db, store, TRAINING, TRUTH, ROWS)
    assert evaluation.measurement is not None and evaluation.measurement.best_f1 is not None
    found = await analyze(stub)
    assert found.confidence_threshold == evaluation.measurement.best_f1.confidence_threshold
    assert found.all.f1 == pytest.approx(evaluation.measurement.best_f1.f1)


async def test_curves_are_of_all_classes_together_and_of_those_asked_for(
    service: Service, stub: Stub, store: ObjectStore
) -> None:
    evaluation = await put_evaluation(service.db, store, TRAINING, TRUTH, ROWS)
    assert evaluation.measurement is not None and evaluation.measurement.best_f1 is not None
    pooled = await get_curves(stub)
    assert [(c.class_name, c.iou) for c in pooled.precision_recall] == [
        ("", 0.5),
        ("", 0.75),
        ("", 0.0),
    ]
    coco = evaluation.measurement.coco
    expected = [coco.map50, coco.map75, coco.map50_95]
    assert [c.ap for c in pooled.precision_recall] == pytest.approx(expected)
    assert list(pooled.recalls) == list(pooled.thresholds) == [n / 100 for n in range(101)]
    (curve,) = pooled.confidence
    assert curve.precisions[:41] == [1 / 6] * 41  # 0.4 is kept at 0.4
    assert (curve.precisions[90], curve.recalls[90]) == (1.0, 0.25)
    assert (curve.precisions[91], curve.recalls[91], curve.f1s[91]) == (1.0, 0.0, 0.0)
    assert curve.best_f1.f1 == evaluation.measurement.best_f1.f1

    some = await get_curves(stub, "class 2", "class 0", "class 2")
    assert [c.class_name for c in some.confidence] == ["", "class 2", "class 0"]
    without_boxes = [c for c in some.precision_recall if c.class_name == "class 2"]
    assert [(list(c.precisions), c.ap) for c in without_boxes] == [([], -1.0)] * 3
    nothing = some.confidence[1]
    assert not nothing.recalls and not nothing.f1s and not nothing.HasField("best_f1")
    assert nothing.precisions[50] == 0.0 and nothing.precisions[51] == 1.0
    every = await get_curves(stub, "*")
    assert [c.class_name for c in every.confidence] == ["", "class 0", "class 1", "class 2"]


async def test_calibration_compares_confidence_with_precision(
    service: Service, stub: Stub, store: ObjectStore
) -> None:
    await put_evaluation(service.db, store, TRAINING, TRUTH, ROWS)
    found = (await get_curves(stub)).calibration
    assert len(found.bins) == 20
    assert [b.num_detections for b in found.bins if b.num_detections] == [1] * 6
    right = found.bins[18]  # 0.90 to 0.95
    assert (right.min_confidence, right.num_detections, right.precision) == (0.9, 1, 1.0)
    assert right.mean_confidence == pytest.approx(0.9)
    # |0.9 - 1| once, and the confidences of the five that are wrong.
    assert found.expected_error == pytest.approx((0.1 + 0.8 + 0.7 + 0.6 + 0.5 + 0.4) / 6)
    assert found.max_error == pytest.approx(0.8)


async def test_unknown_classes_are_named_with_those_there_are(
    service: Service, stub: Stub, store: ObjectStore
) -> None:
    await put_evaluation(service.db, store, TRAINING, TRUTH, ROWS)
    with pytest.raises(InvalidArgument) as caught:
        await get_curves(stub, "class 1", "clas 2", "*")
    assert [v.field for v in caught.value.violations] == ["class_names[1]", "class_names[2]"]
    assert '"clas 2"; there are: class 0, class 1, class 2' in caught.value.message


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
async def test_threshold_outside_0_to_1_is_rejected(stub: Stub, threshold: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await analyze(stub, threshold)
    assert [v.field for v in caught.value.violations] == ["confidence_threshold"]


async def test_split_without_ground_truth_has_curves_without_recall(
    service: Service, stub: Stub, store: ObjectStore
) -> None:
    rows: list[Row] = [(1, 0, 0.5, 0, 0, 10, 10)]
    await put_evaluation(service.db, store, TRAINING, ground_truth(2, 1, []), rows)
    found = await get_curves(stub, "*")
    assert {(c.ap, len(c.precisions)) for c in found.precision_recall} == {(-1.0, 0)}
    assert not found.confidence[0].recalls and not found.confidence[0].HasField("best_f1")
    analysis = await analyze(stub)
    assert analysis.confidence_threshold == 0.0
    assert counts(analysis.all) == (0, 1, 0)
    assert cells(analysis) == {("", "class 0"): 1}
    assert {e.map50_gain for e in analysis.errors} == {0.0}


async def test_split_without_detections_misses_everything(
    service: Service, stub: Stub, store: ObjectStore
) -> None:
    await put_evaluation(service.db, store, TRAINING, TRUTH, [])
    analysis = await analyze(stub)
    assert counts(analysis.all) == (0, 0, 4)
    assert cells(analysis) == {("class 0", ""): 3, ("class 1", ""): 1}
    assert [(e.count, e.map50_gain) for e in analysis.errors] == [(0, 0.0)] * 5 + [(4, 1.0)]
    curves = await get_curves(stub)
    assert curves.precision_recall[0].ap == 0.0
    assert curves.calibration.expected_error == 0.0


async def test_what_has_no_matches_says_why(
    service: Service, stub: Stub, store: ObjectStore
) -> None:
    with pytest.raises(NotFound):
        await analyze(stub)
    await put_evaluation(service.db, store, TRAINING, TRUTH, ROWS)
    store.delete("evaluations/t/1/val.npz")
    with pytest.raises(DataLoss) as lost:
        await analyze(stub)
    assert lost.value.reason == "OBJECT_LOST"
    async with service.db.connection() as conn:
        await conn.execute("update evaluation set matches = null")
    with pytest.raises(FailedPrecondition) as old:
        await analyze(stub)
    assert old.value.reason == "NO_MATCHES"
    async with service.db.connection() as conn:
        await conn.execute("update evaluation set measurement = null, failure = ''")
    with pytest.raises(FailedPrecondition) as failed:
        await analyze(stub)
    assert failed.value.reason == "EVALUATION_FAILED"
