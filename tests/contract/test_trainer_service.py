"""Every RPC of the trainer service through the real wiring; workers are puppets."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import pytest

from detflow import channels
from detflow.errors import (
    AlreadyExists,
    DetflowError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from detflow.v1 import trainer_pb2, training_pb2, version_pb2
from detflow.v1.training_pb2 import (
    STOP_MODE_DISCARD,
    STOP_MODE_FINISH,
    STOP_MODE_PAUSE,
    STOP_MODE_UNSPECIFIED,
)
from services.trainer.hyperparameters import SCHEMA
from tests.trainer_players import PROJECT, VERSION
from tests.trainer_rig import Rig, State, rig

__all__ = ["rig"]

Version = version_pb2.Version


async def refused(
    call: Awaitable[object], error: type[DetflowError], reason: str, *texts: str
) -> DetflowError:
    """Awaits a call that must be refused, for a reason that names these."""
    with pytest.raises(error) as caught:
        await call
    assert caught.value.reason == reason
    for text in texts:
        assert text in caught.value.message
    return caught.value


# --- catalogue


async def test_catalogue_lists_the_models_with_their_licence(rig: Rig) -> None:
    models = (await rig.stub.ListModels(trainer_pb2.ListModelsRequest())).models
    assert [model.name for model in models][:2] == ["models/yolov5n", "models/yolov5s"]
    assert len(models) == 18
    assert {(model.family, model.licence) for model in models} == {
        ("yolov5", "AGPL-3.0"),
        ("yolov8", "AGPL-3.0"),
        ("efficientdet", "Apache-2.0"),
    }


async def test_schema_gives_type_range_default_and_help_in_both_languages(rig: Rig) -> None:
    schema = (
        await rig.stub.GetHyperparameterSchema(trainer_pb2.GetHyperparameterSchemaRequest())
    ).hyperparameters
    by_name = {entry.name: entry for entry in schema}
    assert list(by_name) == [entry.name for entry in SCHEMA]
    assert by_name["image_size"].type == trainer_pb2.Hyperparameter.INTEGER
    assert (by_name["image_size"].minimum, by_name["image_size"].maximum) == (32, 2048)
    assert by_name["image_size"].multiple_of == 32
    assert by_name["image_size"].defaults["yolov8"].number_value == 640
    assert by_name["lr0"].multiple_of == 0
    assert set(by_name["dfl"].families) == set(by_name["dfl"].defaults) == {"yolov5", "yolov8"}
    assert set(by_name["dfl"].families) <= set(by_name["lr0"].families)
    assert by_name["cos_lr"].defaults["yolov5"].bool_value is False
    assert not by_name["cos_lr"].HasField("minimum")
    assert "AdamW" in by_name["optimizer"].choices
    assert all(entry.help_en and entry.help_ko for entry in schema)


# --- start


async def test_start_returns_at_once_in_queued_with_everything_resolved(rig: Rig) -> None:
    with channels.translate():
        training = await rig.stub.StartTraining(
            trainer_pb2.StartTrainingRequest(parent=VERSION, training=training_pb2.Training())
        )
    assert training.name.startswith(f"{VERSION}/trainings/")
    assert (training.state, training.revision, training.attempt) == (State.QUEUED, 1, 0)
    assert (training.model, training.batch_size, training.epochs) == ("yolov5s", 16, 200)
    assert set(training.hyperparameters.fields) == {entry.name for entry in SCHEMA}
    assert training.hyperparameters["image_size"] == 640
    assert training.hyperparameters["nominal_batch_size"] == 16
    assert training.HasField("create_time") and not training.HasField("start_time")


async def test_what_the_user_set_is_in_force_and_reaches_the_worker(rig: Rig) -> None:
    training = await rig.start_with(image_size=128, optimizer="SGD", cos_lr=True, lr0=0.05)
    puppet = await rig.puppet()
    told = puppet.hello["spec"]
    assert told["training"] == training.name
    for values in (dict(training.hyperparameters), told["hyperparameters"]):
        assert values["image_size"] == 128
        assert (values["optimizer"], values["cos_lr"], values["lr0"]) == ("SGD", True, 0.05)
    assert told["manifest"]["key"] == "bundles/manifests/a.json"


async def test_worker_gets_no_database_address(rig: Rig) -> None:
    await rig.start()
    environment = (await rig.puppet()).hello["environment"]
    assert {"DETFLOW_NATS_URL", "DETFLOW_STORE_URL", "OMP_NUM_THREADS"} <= set(environment)
    assert not {"DETFLOW_DATABASE_URL", "SECRET"} & set(environment)


async def test_same_request_id_gives_the_same_training(rig: Rig) -> None:
    first, *others = await asyncio.gather(*(rig.start(request_id="r") for _ in range(5)))
    assert {other.name for other in others} == {first.name}
    assert (await rig.start(request_id="r", model="nonsense")).name == first.name


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("lr0", math.nan, "OUT_OF_RANGE"),
        ("lr0", math.inf, "OUT_OF_RANGE"),
        ("lr0", 0.0, "OUT_OF_RANGE"),
        ("lr0", "0.1", "WRONG_TYPE"),
        ("lr0", True, "WRONG_TYPE"),
        ("lr0", None, "WRONG_TYPE"),
        ("lr0", [0.1], "WRONG_TYPE"),
        ("image_size", 100, "OUT_OF_RANGE"),
        ("image_size", 4096, "OUT_OF_RANGE"),
        ("patience", 1.5, "OUT_OF_RANGE"),
        ("amp", 1, "WRONG_TYPE"),
        ("optimizer", "Lion", "OUT_OF_RANGE"),
        ("optimizer", 3, "WRONG_TYPE"),
    ],
)
async def test_hyperparameter_out_of_range_names_field_and_range(
    rig: Rig, key: str, value: Any, reason: str
) -> None:
    error = await refused(rig.start_with(**{key: value}), InvalidArgument, reason, key, "must be")
    assert error.violations[0].field == f"training.hyperparameters.{key}"


async def test_every_wrong_hyperparameter_is_named_with_its_nearest_known(rig: Rig) -> None:
    error = await refused(
        rig.start_with(learning_rate=0.1, weight_decy=0.1, lr0=9),
        InvalidArgument,
        "UNKNOWN_HYPERPARAMETER",
    )
    by_field = {violation.field.rsplit(".", 1)[1]: violation for violation in error.violations}
    assert set(by_field) == {"learning_rate", "weight_decy", "lr0"}
    assert "weight_decay" in by_field["weight_decy"].description
    assert by_field["lr0"].reason == "OUT_OF_RANGE"


async def test_unknown_model_lists_the_ids(rig: Rig) -> None:
    error = await refused(
        rig.start(model="yolov8"), InvalidArgument, "UNKNOWN_MODEL", "yolov5n", "yolov8x"
    )
    assert error.violations[0].field == "training.model"


@pytest.mark.parametrize("value", [0, -1, 1_000_000_000])
@pytest.mark.parametrize("key", ["batch_size", "epochs"])
async def test_batch_and_epochs_out_of_range_are_refused(rig: Rig, key: str, value: int) -> None:
    start = rig.start(**dict[str, Any]({key: value}))
    error = await refused(start, InvalidArgument, "INVALID_FIELD")
    assert error.violations[0].field == f"training.{key}"


@pytest.mark.parametrize("parent", ["", "projects/p", f"{VERSION}/", "projects/../versions/x"])
async def test_malformed_names_are_refused(rig: Rig, parent: str) -> None:
    await refused(rig.start(parent=parent), InvalidArgument, "INVALID_FIELD")
    await refused(rig.list_trainings(parent=parent), InvalidArgument, "INVALID_FIELD")
    await refused(rig.get(parent), InvalidArgument, "INVALID_FIELD")
    await refused(rig.stop(parent, STOP_MODE_PAUSE), InvalidArgument, "INVALID_FIELD")
    await refused(rig.resume(parent), InvalidArgument, "INVALID_FIELD")


async def test_version_that_is_missing_deleted_or_foreign_is_not_found_alike(rig: Rig) -> None:
    rig.versions.put(f"{PROJECT}/versions/gone")
    rig.versions.by_name[f"{PROJECT}/versions/gone"].delete_time.GetCurrentTime()
    messages = set()
    for parent in (
        f"{PROJECT}/versions/none",
        f"{PROJECT}/versions/gone",
        "projects/other/versions/v1",
    ):
        error = await refused(rig.start(parent=parent), NotFound, "NOT_FOUND")
        messages.add(error.message.replace(parent, "NAME"))
    assert messages == {"NAME does not exist"}


@pytest.mark.parametrize("state", [Version.PREPROCESSING, Version.FAILED, Version.COMPLETED])
async def test_version_that_is_not_ready_is_refused(
    rig: Rig, state: "version_pb2.Version.State.ValueType"
) -> None:
    rig.versions.put(VERSION, state)
    await refused(rig.start(), FailedPrecondition, "VERSION_NOT_READY", Version.State.Name(state))


async def test_second_start_names_the_training_that_runs(rig: Rig) -> None:
    first = await rig.start()
    error = await refused(rig.start(), AlreadyExists, "TRAINING_RUNS", first.name)
    assert error.metadata["training"] == first.name


async def test_trained_version_is_not_trained_again(rig: Rig) -> None:
    training, puppet = await rig.running()
    await puppet.finish()
    await rig.evaluate_both(training.name)
    await rig.until_state(training.name, State.SUCCEEDED)
    await refused(rig.start(), FailedPrecondition, "VERSION_NOT_READY", training.name)


async def test_start_after_a_pause_does_not_wait_for_the_versions_view(rig: Rig) -> None:
    training = await rig.start()
    await rig.stop(training.name, STOP_MODE_PAUSE)
    await rig.until_state(training.name, State.PAUSED)
    rig.versions.put(VERSION, Version.TRAINING)  # it has not heard of the pause yet
    second = await rig.start()
    assert second.name != training.name
    await refused(rig.resume(training.name), AlreadyExists, "TRAINING_RUNS", second.name)


# --- get and list


async def test_training_is_found_by_its_full_name_only(rig: Rig) -> None:
    training = await rig.start()
    assert (await rig.get(training.name)).name == training.name
    wrong = training.name.replace("projects/p/", "projects/q/")
    missing = f"{VERSION}/trainings/none"
    for name in (wrong, missing, training.name.replace("/v1/", "/v2/")):
        for call in (rig.get(name), rig.stop(name, STOP_MODE_PAUSE), rig.resume(name)):
            await refused(call, NotFound, "NOT_FOUND", f"{name} does not exist")
        with pytest.raises(NotFound):
            async for _ in rig.watch(name):
                pass


async def test_trainings_are_paged_newest_first_for_version_and_project(rig: Rig) -> None:
    rig.versions.put(f"{PROJECT}/versions/v2")
    names: list[str] = []
    for parent in (VERSION, f"{PROJECT}/versions/v2", VERSION):
        training = await rig.start(parent=parent)
        await rig.stop(training.name, STOP_MODE_DISCARD)
        await rig.until_state(training.name, State.STOPPED)
        names.insert(0, training.name)
    everything = f"{PROJECT}/versions/-"
    first = await rig.list_trainings(parent=everything, page_size=2)
    rest = await rig.list_trainings(
        parent=everything, page_size=2, page_token=first.next_page_token
    )
    assert [t.name for t in [*first.trainings, *rest.trainings]] == names
    assert not rest.next_page_token
    assert [t.name for t in (await rig.list_trainings()).trainings] == [names[0], names[2]]
    await refused(rig.list_trainings(parent="projects/other/versions/v1"), NotFound, "NOT_FOUND")
    await refused(rig.list_trainings(parent="projects/other/versions/-"), NotFound, "NOT_FOUND")
    rig.versions.put("projects/other/versions/v1")
    assert not (await rig.list_trainings(parent="projects/other/versions/-")).trainings
    for bad in ("x", first.next_page_token + "A", first.next_page_token[:-2]):
        await refused(
            rig.list_trainings(parent=everything, page_token=bad), InvalidArgument, "BAD_PAGE_TOKEN"
        )
    await refused(
        rig.list_trainings(page_token=first.next_page_token), InvalidArgument, "BAD_PAGE_TOKEN"
    )


# --- stop and resume


async def test_pause_keeps_the_checkpoint_and_resume_goes_on_from_it(rig: Rig) -> None:
    training, puppet = await rig.running()
    await puppet.epoch(1)
    await puppet.epoch(2)
    asked = await rig.stop(training.name, STOP_MODE_UNSPECIFIED)
    assert asked.stop_mode == STOP_MODE_PAUSE
    paused = await rig.until_state(training.name, State.PAUSED)
    assert (paused.num_epochs_done, paused.stop_mode) == (2, STOP_MODE_PAUSE)
    assert paused.HasField("end_time") and not paused.HasField("failure")
    assert (await rig.stop(training.name, STOP_MODE_PAUSE)).state == State.PAUSED
    resumed = await rig.resume(training.name)
    assert resumed.state == State.QUEUED and resumed.stop_mode == STOP_MODE_UNSPECIFIED
    assert not resumed.HasField("end_time")
    second = await rig.puppet()
    assert (second.attempt, second.hello["checkpoint"]) == (2, 2)
    assert not puppet.folder.exists()


async def test_finish_is_told_to_the_worker_and_ends_in_stopped_with_evaluations(
    rig: Rig,
) -> None:
    training, puppet = await rig.running()
    await puppet.epoch(1)
    assert (await puppet.tell(lease={})) == {"fenced": False, "stop": 0}
    await rig.stop(training.name, STOP_MODE_FINISH)
    assert (await puppet.tell(lease={})) == {"fenced": False, "stop": STOP_MODE_FINISH}
    assert (await rig.stop(training.name, STOP_MODE_FINISH)).stop_mode == STOP_MODE_FINISH
    await puppet.finish()
    await rig.evaluate_both(training.name)
    stopped = await rig.until_state(training.name, State.STOPPED)
    assert stopped.weights.key == "best.pt"


async def test_discard_replaces_a_finish_but_not_the_other_way_round(rig: Rig) -> None:
    training, puppet = await rig.running()
    await puppet.tell(ignore_sigterm=True)  # so that the stop takes a while
    await rig.stop(training.name, STOP_MODE_FINISH)
    assert (await rig.stop(training.name, STOP_MODE_DISCARD)).stop_mode == STOP_MODE_DISCARD
    await refused(rig.stop(training.name, STOP_MODE_FINISH), FailedPrecondition, "STOP_IN_PROGRESS")
    await rig.until_state(training.name, State.STOPPED)
    await refused(rig.stop(training.name, STOP_MODE_PAUSE), FailedPrecondition, "TRAINING_NOT_LIVE")
    await refused(rig.resume(training.name), FailedPrecondition, "TRAINING_NOT_RESUMABLE")


async def test_queued_training_stops_at_once(rig: Rig) -> None:
    await rig.running()
    rig.versions.put(f"{PROJECT}/versions/v2")
    waiting = await rig.start(parent=f"{PROJECT}/versions/v2")
    paused = await rig.stop(waiting.name, STOP_MODE_PAUSE)
    assert (paused.state, paused.stop_mode) == (State.PAUSED, STOP_MODE_PAUSE)
    await rig.resume(waiting.name)
    assert (await rig.stop(waiting.name, STOP_MODE_FINISH)).state == State.STOPPED
    assert await rig.history(waiting.name.rsplit("/", 1)[1]) == [
        "QUEUED",
        "PAUSED",
        "QUEUED",
        "STOPPED",
    ]


async def test_stop_of_finished_training_is_rejected(rig: Rig) -> None:
    training, puppet = await rig.running()
    await puppet.finish()
    await rig.evaluate_both(training.name)
    await rig.until_state(training.name, State.SUCCEEDED)
    for mode in (STOP_MODE_PAUSE, STOP_MODE_FINISH, STOP_MODE_DISCARD):
        await refused(rig.stop(training.name, mode), FailedPrecondition, "TRAINING_NOT_LIVE")
    await refused(rig.resume(training.name), FailedPrecondition, "TRAINING_NOT_RESUMABLE")


async def test_unknown_stop_mode_is_refused(rig: Rig) -> None:
    training = await rig.start()
    nonsense: Any = 9
    await refused(rig.stop(training.name, nonsense), InvalidArgument, "INVALID_FIELD")


# --- watch


async def test_watch_shows_states_epochs_logs_and_progress_and_ends(rig: Rig) -> None:
    training = await rig.start()
    watching = asyncio.create_task(read(rig.watch(training.name)))
    puppet = await rig.puppet()
    await puppet.started()
    await puppet.log("one", "둘 <b>")
    await puppet.epoch(1, lr=0.5)
    await rig.until_epochs(training.name, 1)
    subject = f"detflow.progress.training.{training.name.rsplit('/', 1)[1]}"
    for attempt in (0, 1):
        progress = training_pb2.TrainingProgress(attempt=attempt, epoch=2, percent=20)
        await rig.bus.publish(subject, progress.SerializeToString())
        await asyncio.sleep(0.15)  # gauges within a tenth of a second replace one another
    await puppet.finish()
    await rig.evaluate_both(training.name)
    seen = await asyncio.wait_for(watching, 20)
    states = [State.Name(item.training.state) for item in seen if item.HasField("training")]
    assert states[-3:] == ["RUNNING", "EVALUATING", "SUCCEEDED"]
    kinds = [item.WhichOneof("what") for item in seen]
    assert kinds.index("log") < kinds.index("epoch") < kinds.index("progress")
    assert [item.progress.attempt for item in seen if item.HasField("progress")] == [1]
    assert next(item.log.lines for item in seen if item.HasField("log")) == ["one", "둘 <b>"]
    assert seen[-1].training.weights.key == "best.pt"


async def test_watch_resumed_at_any_cursor_gives_the_exact_suffix(rig: Rig) -> None:
    training = await rig.start()
    watching = asyncio.create_task(read(rig.watch(training.name)))
    puppet = await rig.puppet()
    await puppet.started()
    for number in range(1, 4):
        await puppet.epoch(number)
    await puppet.finish()
    await rig.evaluate_both(training.name)
    everything = await asyncio.wait_for(watching, 20)
    assert everything[-1].training.state == State.SUCCEEDED
    # The snapshot can be ahead of the stream: its cursor may give again what it had.
    for index, item in enumerate(everything[1:-1], start=1):
        suffix = await read(rig.watch(training.name, cursor=item.cursor))
        assert suffix == everything[index + 1 :]
    # A snapshot of a final state is all there is to say about it.
    assert len(await read(rig.watch(training.name))) == 1


async def read(
    stream: AsyncIterator[trainer_pb2.WatchTrainingResponse],
) -> list[trainer_pb2.WatchTrainingResponse]:
    """Reads a watch to its end, without what says only that it lives."""
    return [item async for item in stream if not item.HasField("heartbeat")]


async def test_bad_cursor_is_refused(rig: Rig) -> None:
    training = await rig.start()
    with pytest.raises(InvalidArgument) as caught:
        async for _ in rig.watch(training.name, cursor="nonsense"):
            pass
    assert caught.value.reason == "BAD_CURSOR"
