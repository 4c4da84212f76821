"""The client for asyncio. Made by tools/async_stub.py, not to be edited."""

import datetime
import os
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, Unpack

from detflow.client.columns import Columns
from detflow.client.predictions import Image
from detflow.client.progress import Progress, TrainingProgress
from detflow.client.recipes import RecipeOptions
from detflow.client.reports import _Path
from detflow.client.showing import Showable, Shown
from detflow.v1 import (
    access_pb2,
    analysis_pb2,
    common_pb2,
    comparison_pb2,
    dataset_pb2,
    export_pb2,
    inference_pb2,
    metrics_pb2,
    prediction_pb2,
    preprocess_pb2,
    project_pb2,
    trainer_pb2,
    training_pb2,
    version_pb2,
    webhook_pb2,
    weights_pb2,
)

class Projects:
    """Calls about projects."""
    async def create(self, project_id: str, *, display_name: str = ...) -> project_pb2.Project:
        """Creates a project; the id is lower-case letters, digits and hyphens."""
    async def get(self, project_id: str) -> project_pb2.Project:
        """Gets a project."""
    async def list(self) -> Sequence[project_pb2.Project]:
        """Lists the projects that the caller may see, oldest first."""
    async def update(
        self,
        project_id: str,
        *,
        display_name: str | None = ...,
        max_storage_bytes: int | None = ...,
        max_running_trainings: int | None = ...,
    ) -> project_pb2.Project:
        """Changes what is given."""
    async def ensure(self, project_id: str) -> None:
        """Creates a project unless it is there."""

class Datasets:
    """Calls about datasets."""
    async def import_(
        self,
        source: str | os.PathLike[str],
        *,
        project: str = ...,
        name: str = ...,
        skip_invalid: bool = ...,
        format: str = ...,
        progress: Progress = ...,
    ) -> dataset_pb2.Dataset:
        """Imports an archive (zip, tar, tar.gz), a folder or a URL, and waits until it is done."""
    async def get(self, name: str) -> dataset_pb2.Dataset:
        """Gets a dataset by its resource name."""
    async def list(self, project: str = ...) -> Sequence[dataset_pb2.Dataset]:
        """Lists a project's datasets, newest first."""
    async def find(self, text: str, project: str = ...) -> dataset_pb2.Dataset:
        """Gets a dataset by resource name, id or display name; the newest if several have it."""
    def problems(self, name: str) -> AsyncGenerator[common_pb2.Problem]:
        """Yields everything that an import left out, clipped or refused, by place."""
    async def download(
        self,
        name: str,
        destination: str | os.PathLike[str],
        *,
        format: str = ...,
        progress: Progress = ...,
    ) -> Path:
        """Downloads a dataset as a zip; it appears whole, or not at all."""
    async def statistics(self, name: str) -> dataset_pb2.DatasetStatistics:
        """Gets what a READY dataset says about itself: counts, histograms, likely mistakes."""
    async def delete(self, name: str) -> None:
        """Deletes a dataset that no version uses."""
    def watch(
        self, name: str, *, cursor: str = ...
    ) -> AsyncGenerator[dataset_pb2.WatchDatasetResponse]:
        """Watches an import; ends after READY or FAILED."""

class Versions:
    """Calls about versions."""
    async def create(
        self,
        dataset: str,
        *,
        name: str = ...,
        labels: Mapping[str, str] | None = ...,
        parent: str = ...,
        recipe: version_pb2.Recipe | None = ...,
        **options: Unpack[RecipeOptions],
    ) -> version_pb2.Version:
        """Creates a version; it returns at once, in PREPROCESSING."""
    async def preview(
        self,
        dataset: str,
        *,
        num_samples: int = ...,
        recipe: version_pb2.Recipe | None = ...,
        **options: Unpack[RecipeOptions],
    ) -> preprocess_pb2.PreviewVersionResponse:
        """Shows what `create` would make: images in each split, and images before and after."""
    async def wait(self, name: str, *, progress: Progress = ...) -> version_pb2.Version:
        """Waits until a version's preprocessing is over and returns the version."""
    async def get(self, name: str) -> version_pb2.Version:
        """Gets a version by its resource name."""
    async def list(
        self,
        project: str = ...,
        *,
        show_deleted: bool = ...,
        filter: str = ...,
        order_by: str = ...,
    ) -> Sequence[version_pb2.Version]:
        """Lists a project's versions."""
    async def find(
        self, text: str, project: str = ..., *, deleted: bool = ...
    ) -> version_pb2.Version:
        """Gets a version by resource name, id or display name; the newest if several have it."""
    async def leaks(self, name: str) -> preprocess_pb2.LeakReport:
        """Gets the leak report of a preprocessed version: what its split kept together."""
    async def rename(self, name: str, display_name: str, *, etag: str = ...) -> version_pb2.Version:
        """Changes the name shown to people."""
    async def label(self, name: str, changes: Mapping[str, str | None]) -> version_pb2.Version:
        """Changes labels of a version; those not named stay."""
    async def read_replay(self, name: str) -> bytes:
        """Reads all that is needed to make a version again, as JSON."""
    async def download_replay(self, name: str, destination: str | os.PathLike[str]) -> Path:
        """Writes what `read_replay` returns to a file, which appears whole, or not at all."""
    async def delete(self, name: str, *, etag: str = ...) -> version_pb2.Version:
        """Moves a version to the trash; a running training is stopped."""
    async def restore(self, name: str) -> version_pb2.Version:
        """Takes a version out of the trash."""
    def watch(
        self, project: str = ..., *, cursor: str = ...
    ) -> AsyncGenerator[version_pb2.WatchVersionsResponse]:
        """Watches a project's versions: all as they are, then every change. It has no end."""
    def watch_preprocessing(
        self, name: str, *, cursor: str = ...
    ) -> AsyncGenerator[preprocess_pb2.WatchPreprocessingResponse]:
        """Watches the preprocessing of a version; ends after its final state."""

class Trainings:
    """Calls about trainings."""
    async def purge(
        self,
        project: str = ...,
        *,
        min_age: datetime.timedelta | None = ...,
        validate_only: bool = ...,
    ) -> Sequence[trainer_pb2.PurgedArtifacts]:
        """Deletes old checkpoints of trainings that were paused or have failed, and old exports."""
    async def start(
        self,
        version: str,
        *,
        model: str = ...,
        batch_size: int | None = ...,
        epochs: int | None = ...,
        hyperparameters: Mapping[str, float | bool | str] | None = ...,
        priority: int = ...,
        warm_start: str = ...,
        num_nodes: int = ...,
        num_devices: int = ...,
        validate_only: bool = ...,
    ) -> training_pb2.Training:
        """Starts a training of a READY version; it returns at once, in QUEUED."""
    async def wait(self, name: str, *, progress: TrainingProgress = ...) -> training_pb2.Training:
        """Waits until a training has ended, and returns it: SUCCEEDED, STOPPED or PAUSED."""
    async def update(self, name: str, *, priority: int) -> training_pb2.Training:
        """Changes the priority of a training that waits."""
    async def get(self, name: str) -> training_pb2.Training:
        """Gets a training by its resource name."""
    async def list(
        self, project: str = ..., *, version: str = ...
    ) -> Sequence[training_pb2.Training]:
        """Lists the trainings of a project, or of a version (resource name), newest first."""
    async def find(self, text: str, project: str = ...) -> training_pb2.Training:
        """Gets a training by resource name or id, or the newest of a version by its name."""
    async def stop(self, name: str, *, mode: str = ...) -> training_pb2.Training:
        """Asks a training to stop."""
    async def resume(self, name: str) -> training_pb2.Training:
        """Queues a PAUSED or FAILED training again, from its last checkpoint."""
    def watch(
        self, name: str, *, cursor: str = ...
    ) -> AsyncGenerator[trainer_pb2.WatchTrainingResponse]:
        """Watches a training: as it is, then states, progress, epochs and log lines, to its end."""

class Exports:
    """Calls about exports."""
    async def create(
        self,
        training: str,
        *,
        format: str,
        precision: str = ...,
        image_size_px: int = ...,
        batch_size: int = ...,
        dynamic: bool = ...,
        simplify: bool = ...,
        opset: int = ...,
        end_to_end: bool = ...,
    ) -> export_pb2.Export:
        """Starts an export of a training that has weights; it returns at once, in QUEUED."""
    async def wait(self, name: str, *, progress: Progress = ...) -> export_pb2.Export:
        """Waits until an export is made, and returns it."""
    async def get(self, name: str) -> export_pb2.Export:
        """Gets an export by its resource name."""
    async def list(self, training: str) -> Sequence[export_pb2.Export]:
        """Lists the exports of a training (resource name), newest first."""
    def watch(
        self, name: str, *, cursor: str = ...
    ) -> AsyncGenerator[export_pb2.WatchExportResponse]:
        """Watches an export: as it is, then progress and changes, to its end."""
    async def cancel(self, name: str) -> export_pb2.Export:
        """Cancels an export that is not finished."""
    async def delete(self, name: str) -> None:
        """Deletes an export and its file; cancels it first if it is not finished."""
    async def download(
        self, name: str, destination: str | os.PathLike[str], *, progress: Progress = ...
    ) -> Path:
        """Downloads the file of a finished export; it appears whole and checked, or not at all."""
    async def path_of(self, export: export_pb2.Export, destination: str | os.PathLike[str]) -> Path:
        """Returns where `download` puts a file: in a folder, under its own name."""

class Weights:
    """Calls about uploaded weights."""
    async def upload(
        self,
        source: str | os.PathLike[str],
        *,
        project: str = ...,
        name: str = ...,
        progress: Progress = ...,
    ) -> weights_pb2.Weights:
        """Uploads a weights file, of torch.save or safetensors."""
    async def ensure(
        self, source: str | os.PathLike[str], *, project: str = ..., progress: Progress = ...
    ) -> weights_pb2.Weights:
        """Uploads a weights file unless the project has one with the same bytes."""
    async def get(self, name: str) -> weights_pb2.Weights:
        """Gets the description of weights by their resource name."""
    async def list(self, project: str = ...) -> Sequence[weights_pb2.Weights]:
        """Lists a project's uploaded weights, newest first."""
    async def find(self, text: str, project: str = ...) -> weights_pb2.Weights:
        """Gets weights by resource name, id or display name; the newest if several have it."""
    async def delete(self, name: str) -> None:
        """Deletes uploaded weights; trainings that have begun keep what they took over."""

class Webhooks:
    """Calls about webhooks."""
    async def create(
        self, url: str, *, project: str = ..., name: str = ..., events: Sequence[str] = ...
    ) -> webhook_pb2.Webhook:
        """Creates a webhook; `secret` of the answer signs its messages and is not shown again."""
    async def get(self, name: str) -> webhook_pb2.Webhook:
        """Gets a webhook by its resource name."""
    async def list(self, project: str = ...) -> Sequence[webhook_pb2.Webhook]:
        """Lists the webhooks of a project, newest first."""
    async def find(self, text: str, project: str = ...) -> webhook_pb2.Webhook:
        """Gets a webhook by resource name, id or display name; the newest if several have it."""
    async def update(
        self,
        name: str,
        *,
        display_name: str | None = ...,
        url: str | None = ...,
        events: Sequence[str] | None = ...,
        disabled: bool | None = ...,
        etag: str = ...,
    ) -> webhook_pb2.Webhook:
        """Changes what is given; no events means all of them."""
    async def delete(self, name: str) -> None:
        """Deletes a webhook with its deliveries; what was to be sent is not."""
    async def rotate_secret(self, name: str) -> webhook_pb2.Webhook:
        """Makes a new secret, which the answer holds; the old one signs beside it for a day."""
    async def test(self, name: str) -> webhook_pb2.WebhookDelivery:
        """Sends a message of no consequence, once, and returns how it went."""
    async def deliveries(
        self, name: str, *, limit: int | None = ...
    ) -> Sequence[webhook_pb2.WebhookDelivery]:
        """Lists the deliveries of a webhook of the last 30 days, newest first."""

class Metrics:
    """Calls about what was measured."""
    async def series(
        self, training: str, names: Sequence[str] = ..., *, steps: bool = ..., max_points: int = ...
    ) -> Sequence[metrics_pb2.MetricSeries]:
        """Returns the series of a training, sorted by name; all of them unless named."""
    async def columns(
        self, training: str, names: Sequence[str] = ..., resolution: Literal["epoch", "step"] = ...
    ) -> Mapping[str, Columns]:
        """Returns whole series, nothing thinned out; a million values take less than a second."""
    async def evaluations(self, training: str) -> Sequence[metrics_pb2.Evaluation]:
        """Returns the evaluations of a training: validation, then test."""
    def watch(
        self, training: str, *, cursor: str = ..., steps: bool = ...
    ) -> AsyncGenerator[metrics_pb2.WatchMetricsResponse]:
        """Watches both: what there is, then every epoch and evaluation; with `steps` these too."""
    async def evaluation(self, training: str, split: str) -> metrics_pb2.Evaluation:
        """Returns the evaluation of one split."""
    async def curves(
        self, training: str, split: str, classes: Sequence[str] = ...
    ) -> analysis_pb2.EvaluationCurves:
        """Returns precision by recall, what every confidence threshold gives, and calibration."""
    async def analyze(
        self, training: str, split: str, threshold: float | None = ...
    ) -> analysis_pb2.EvaluationAnalysis:
        """Returns what a confidence threshold makes of an evaluation: counts, confusion, errors."""

class Predictions:
    """Calls about predictions."""
    def predict(
        self,
        training: str,
        images: Iterable[Image],
        *,
        confidence_threshold: float | None = ...,
        nms_iou: float | None = ...,
        max_detections: int = ...,
        drawn_side_px: int = ...,
        progress: Progress = ...,
    ) -> AsyncGenerator[prediction_pb2.Prediction]:
        """Finds things in images; yields what was found in each, in their order, as it comes."""

class Comparisons:
    """Calls about trainings that were measured on the same images."""
    async def compare(
        self,
        trainings: Sequence[str],
        split: str = ...,
        *,
        num_resamples: int = ...,
        confidence_level: float = ...,
        seed: int = ...,
    ) -> comparison_pb2.Comparison:
        """Compares trainings with the first of them, on the images of one split."""

class Results:
    """Calls about inference results."""
    def list(
        self,
        training: str,
        split: str = ...,
        *,
        threshold: float | None = ...,
        classes: Sequence[str] = ...,
        error_kinds: Sequence[str] = ...,
        confused: tuple[str, str] | None = ...,
        order: str = ...,
    ) -> AsyncGenerator[inference_pb2.InferenceResult]:
        """Yields the images of a split with what was found in them; of several filters all hold."""
    async def page(
        self,
        training: str,
        split: str = ...,
        *,
        threshold: float | None = ...,
        classes: Sequence[str] = ...,
        error_kinds: Sequence[str] = ...,
        confused: tuple[str, str] | None = ...,
        order: str = ...,
        size: int = ...,
        token: str = ...,
    ) -> inference_pb2.ListInferenceResultsResponse:
        """Returns one page of `list`, with how many images there are and the threshold applied."""
    async def get(
        self, name: str, *, threshold: float | None = ...
    ) -> inference_pb2.InferenceResult:
        """Returns one image's result."""
    async def image(
        self,
        name: str,
        *,
        detections: bool = ...,
        truths: bool = ...,
        threshold: float | None = ...,
        max_side_px: int = ...,
        png: bool = ...,
    ) -> bytes:
        """Returns the image of a result: a JPEG, as the model saw it, unless asked otherwise."""
    async def save_image(
        self,
        name: str,
        path: Path | str,
        *,
        detections: bool = ...,
        truths: bool = ...,
        threshold: float | None = ...,
        max_side_px: int = ...,
    ) -> Path:
        """Writes the image of a result to a file, as PNG if its name says so, else as JPEG."""

class Reports:
    """Calls about reports, charts and tables of trainings.

    Example:
        client.reports.download(training.name, "report.html", language="ko")
        client.reports.comparison([old.name, new.name], "comparison.html")
        client.reports.chart(training.name, "confusion", "confusion.svg")
        client.reports.table(training.name, "detections", "detections.csv", threshold=0.5)
    """
    async def download(
        self, training: str, path: _Path, *, format: str = ..., language: str = ...
    ) -> Path:
        """Writes the report of a training: all that is known of it so far."""
    async def comparison(
        self,
        trainings: Sequence[str],
        path: _Path,
        *,
        split: str = ...,
        format: str = ...,
        language: str = ...,
    ) -> Path:
        """Writes a report that compares trainings with the first of them."""
    async def chart(
        self, training: str, chart: str, path: _Path, *, split: str = ..., language: str = ...
    ) -> Path:
        """Writes one chart, as SVG if the name of the file says so, else as PNG."""
    async def table(
        self,
        training: str,
        table: str,
        path: _Path,
        *,
        split: str = ...,
        threshold: float | None = ...,
    ) -> Path:
        """Writes one table, as JSON if the name of the file says so, else as CSV."""
    def iter_table(
        self,
        training: str,
        table: str,
        *,
        json: bool = ...,
        split: str = ...,
        threshold: float | None = ...,
    ) -> AsyncGenerator[bytes]:
        """Yields one table in parts, as they are made."""

class Access:
    """Calls about whoever calls."""
    async def principal(self) -> access_pb2.Principal:
        """Says who is calling and what the caller may do."""
    async def login_link(self) -> access_pb2.LoginLink:
        """Makes a link that signs one browser in as the caller; its `path` is the gateway's."""

class Keys:
    """Calls about API keys."""
    async def create(
        self,
        name: str,
        *,
        role: str = ...,
        project: str = ...,
        expires: datetime.datetime | datetime.timedelta | None = ...,
    ) -> access_pb2.ApiKey:
        """Creates an API key; `token` of the answer is not shown again."""
    async def list(self, project: str = ...) -> Sequence[access_pb2.ApiKey]:
        """Lists the API keys of a project, oldest first, without their tokens."""
    async def find(self, text: str, project: str = ...) -> access_pb2.ApiKey:
        """Gets an API key by resource name, id or display name."""
    async def update(
        self,
        name: str,
        *,
        display_name: str | None = ...,
        role: str | None = ...,
        expires: datetime.datetime | datetime.timedelta | None = ...,
        never_expires: bool = ...,
    ) -> access_pb2.ApiKey:
        """Changes what is given."""
    async def delete(self, name: str) -> None:
        """Deletes an API key: within ten seconds nobody is let in with it."""

class Members:
    """Calls about members."""
    async def create(self, user: str, *, role: str = ..., project: str = ...) -> access_pb2.Member:
        """Makes a person a member."""
    async def list(self, project: str = ...) -> Sequence[access_pb2.Member]:
        """Lists the members of a project, oldest first."""
    async def find(self, text: str, project: str = ...) -> access_pb2.Member:
        """Gets a member by resource name, id, e-mail address or subject."""
    async def update(self, name: str, *, role: str) -> access_pb2.Member:
        """Gives a member another role."""
    async def delete(self, name: str) -> None:
        """Takes a person's membership away; it counts within ten seconds."""

class Audit:
    """Calls about the audit log."""
    async def list(
        self,
        project: str = ...,
        *,
        subject: str = ...,
        resource: str = ...,
        limit: int | None = ...,
    ) -> Sequence[access_pb2.AuditEntry]:
        """Lists the calls that changed something, or were to, newest first."""

class AsyncClient:
    """A connection to one detflow, for asyncio: the nouns and methods of `Client`, awaited.

    What gives an iterator there gives an async iterator here. Watches go on by themselves where a
    stream breaks; one that is closed (`contextlib.aclosing`), or whose task is cancelled, ends its
    call. A cancelled coroutine ends when what it has begun has ended. Functions given as `progress`
    are called in the event loop.

    Example:
        async with detflow.AsyncClient() as client:
            training = await client.trainings.find("V_0")
            async for message in client.trainings.watch(training.name):
                print(message.WhichOneof("what"))

    Args:
        address: As of `Client`, and so the others.
        options: As of `Client`.
    """

    address: str
    projects: Projects
    datasets: Datasets
    versions: Versions
    trainings: Trainings
    exports: Exports
    weights: Weights
    webhooks: Webhooks
    metrics: Metrics
    predictions: Predictions
    comparisons: Comparisons
    results: Results
    reports: Reports
    access: Access
    keys: Keys
    members: Members
    audit: Audit

    def __init__(
        self,
        address: str = ...,
        *,
        timeout: float = ...,
        environ: Mapping[str, str] = ...,
        token: str | None = ...,
        ca_file: str = ...,
        cert_file: str = ...,
        key_file: str = ...,
    ) -> None: ...
    async def models(self) -> Sequence[trainer_pb2.Model]:
        """Lists the models that can be trained."""
    async def hyperparameters(self, family: str = ...) -> Sequence[trainer_pb2.Hyperparameter]:
        """Lists the advanced hyper-parameters: type, range, defaults and help."""
    async def show(self, message: Showable, *, max_side_px: int = ...) -> Shown:
        """Makes of an answer what a notebook draws, and `print` writes."""
    async def close(self) -> None:
        """Closes the connection; running calls and watches end."""
    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
