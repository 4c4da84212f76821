"""Who may call what: for every method the role it takes and the fields that name resources.

A test enumerates the methods of the descriptors and the fields whose rule is a resource name: one
that is missing here fails it. A path of fields ends in a string or a list of strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from detflow.access import EVERYWHERE, Kind, Principal, Role
from detflow.errors import PermissionDenied, bad_field, not_found

_PACKAGE = "/detflow.v1."
_NAME = re.compile(r"projects/(-|[a-z0-9-]{1,63})(?:/.*)?", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What a method takes.

    Attributes:
        role: Role in the project that `field` names, or in all projects where it is "". Without
            one (ROLE_UNSPECIFIED) anybody whose token counts may call.
        field: Path of the field that names the resource, or the parent of one to be made.
        also: Paths of further fields that may name resources: their projects must be visible.
        changes: Whether it changes something, so that it is written to the audit log.
        services_only: Whether only services may call it.
    """

    role: Role.ValueType
    field: str = ""
    also: tuple[str, ...] = ()
    changes: bool = False
    services_only: bool = False


def _sees(field: str, *also: str) -> Rule:
    return Rule(role=Role.VIEWER, field=field, also=also)


def _edits(field: str, *also: str) -> Rule:
    return Rule(role=Role.EDITOR, field=field, also=also, changes=True)


def _oversees(field: str) -> Rule:
    return Rule(role=Role.ADMIN, field=field)


def _manages(field: str) -> Rule:
    return replace(_oversees(field), changes=True)


_ANYBODY = Rule(role=Role.ROLE_UNSPECIFIED)
_SERVICE = Rule(role=Role.ADMIN, services_only=True)

_TABLE: Final[Mapping[str, Mapping[str, Rule]]] = {
    "AccessService": {
        "GetPrincipal": _ANYBODY,
        "CreateApiKey": _manages("parent"),
        "ListApiKeys": _oversees("parent"),
        "UpdateApiKey": _manages("api_key.name"),
        "DeleteApiKey": _manages("name"),
        "CreateMember": _manages("parent"),
        "ListMembers": _oversees("parent"),
        "UpdateMember": _manages("member.name"),
        "DeleteMember": _manages("name"),
        "CreateLoginLink": replace(_ANYBODY, changes=True),
        "ListAuditEntries": _oversees("parent"),
        "Authenticate": _SERVICE,
        "CreateSession": _SERVICE,
        "DeleteSession": _SERVICE,
    },
    "ProjectService": {
        "CreateProject": _manages(""),
        "GetProject": _sees("name"),
        "ListProjects": _ANYBODY,  # lists what the caller may see
        "UpdateProject": _manages("project.name"),
    },
    "VersionService": {
        "CreateVersion": _edits("parent", "version.dataset", "version.parent_version"),
        "GetVersion": _sees("name"),
        "ListVersions": _sees("parent"),
        "UpdateVersion": _edits("version.name", "version.dataset", "version.parent_version"),
        "DeleteVersion": _edits("name"),
        "UndeleteVersion": _edits("name"),
        "WatchVersions": _sees("parent"),
    },
    "DatasetService": {
        "UploadArchive": _edits("parent"),
        "CreateUpload": _edits("parent"),
        "WriteUpload": _edits("start.name"),
        "GetUpload": _sees("name"),
        "DeleteUpload": _edits("name"),
        "CreateDataset": _edits("parent", "upload"),
        "GetDataset": _sees("name"),
        "ListDatasets": _sees("parent"),
        "GetDatasetStatistics": _sees("name"),
        "ListImportProblems": _sees("parent"),
        "DownloadDataset": _sees("name"),
        "DeleteDataset": _edits("name"),
        "WatchDataset": _sees("name"),
    },
    "PreprocessService": {
        "GetPreprocessing": _sees("version"),
        "WatchPreprocessing": _sees("version"),
        "PreviewVersion": _sees("parent", "dataset"),
        "GetLeakReport": _sees("name"),
        "DownloadReplay": _sees("name"),
        "GetStorageUsage": _sees("name"),
    },
    "TrainerService": {
        "ListModels": _ANYBODY,
        "GetHyperparameterSchema": _ANYBODY,
        "StartTraining": _edits(
            "parent", "training.warm_start.training", "training.warm_start.weights"
        ),
        "GetTraining": _sees("name"),
        "ListTrainings": _sees("parent"),
        "UpdateTraining": _edits(
            "training.name", "training.warm_start.training", "training.warm_start.weights"
        ),
        "StopTraining": _edits("name"),
        "ResumeTraining": _edits("name"),
        "PurgeArtifacts": _manages("parent"),
        "WatchTraining": _sees("name"),
    },
    "ExportService": {
        "CreateExport": _edits("parent"),
        "GetExport": _sees("name"),
        "ListExports": _sees("parent"),
        "CancelExport": _edits("name"),
        "DeleteExport": _edits("name"),
        "WatchExport": _sees("name"),
        "DownloadExport": _sees("name"),
    },
    "WeightsService": {
        "UploadWeights": _edits("header.parent"),
        "GetWeights": _sees("name"),
        "ListWeights": _sees("parent"),
        "DeleteWeights": _edits("name"),
    },
    "MetricsService": {
        "ListMetricSeries": _sees("training"),
        "ReadMetricColumns": _sees("training"),
        "GetEvaluation": _sees("name"),
        "ListEvaluations": _sees("parent"),
        "WatchMetrics": _sees("training"),
    },
    "AnalysisService": {
        "GetEvaluationCurves": _sees("name"),
        "AnalyzeEvaluation": _sees("name"),
    },
    "ComparisonService": {"CompareTrainings": _sees("parent", "trainings")},
    "InferenceService": {
        "ListInferenceResults": _sees("parent"),
        "GetInferenceResult": _sees("name"),
        "GetInferenceImage": _sees("name"),
    },
    "PredictionService": {
        "PredictImage": _sees("header.training"),
        "PredictImages": _sees("header.training"),
    },
    "ReportService": {
        "DownloadReport": _sees("training"),
        "DownloadComparisonReport": _sees("parent", "trainings"),
        "DownloadChart": _sees("training"),
        "DownloadTable": _sees("training"),
    },
    "WebhookService": {  # a webhook's address and signing key are secrets
        "CreateWebhook": _manages("parent"),
        "GetWebhook": _oversees("name"),
        "ListWebhooks": _oversees("parent"),
        "UpdateWebhook": _manages("webhook.name"),
        "DeleteWebhook": _manages("name"),
        "RotateWebhookSecret": _manages("name"),
        "TestWebhook": _manages("name"),
        "ListWebhookDeliveries": _oversees("parent"),
    },
}
RULES: Final[Mapping[str, Rule]] = {
    f"{_PACKAGE}{service}/{method}": rule
    for service, methods in _TABLE.items()
    for method, rule in methods.items()
}
"""Rule of each method by its full name, such as /detflow.v1.VersionService/GetVersion."""


def authorize(principal: Principal, method: str, rule: Rule, request: Any, *, first: bool) -> None:
    """Checks that a caller may send a message.

    Args:
        principal: Who calls.
        method: Full name of the method.
        rule: Its rule.
        request: A message whose fields are valid.
        first: Whether it is the call's first, which has to name the resource.

    Raises:
        NotFound: It names a project in which the caller has no role; said in the same words
            whether that exists or not.
        PermissionDenied: MISSING_ROLE.
        InvalidArgument: BAD_NAME: a field that names a resource does not.
    """
    if rule.services_only:
        if principal.kind != Kind.SERVICE:
            raise _missing_role(principal, method, "the token of the services")
        return
    if principal.role_in(EVERYWHERE) >= rule.role:
        return  # whatever it names; what names nothing is for the handler to refuse
    if not rule.field:
        raise _missing_role(principal, method, f"{Role.Name(rule.role)} in all projects")
    for name in values(request, rule.field):
        if not name and not first:
            continue
        project_id = _project_of(rule.field, name)
        role = _visible(principal, project_id)
        if role < rule.role:
            wanted = "all projects" if project_id == EVERYWHERE else f"projects/{project_id}"
            raise _missing_role(principal, method, f"{Role.Name(rule.role)} in {wanted}")
    for field in rule.also:
        for name in values(request, field):
            if name:
                _visible(principal, _project_of(field, name))


def resource_of(rule: Rule, request: Any) -> str:
    """Returns the name of the resource that a request is about; "" if it names none."""
    if not rule.field:
        project_id = getattr(request, "project_id", "")
        return f"projects/{project_id}" if project_id else ""
    return next(values(request, rule.field), "")


def values(request: Any, path: str) -> Iterator[str]:
    """Yields the strings at a path of fields; "" where a message on the way is not set."""
    *above, last = path.split(".")
    for name in above:
        request = getattr(request, name)
    value = getattr(request, last)
    if isinstance(value, str):
        yield value
    else:
        yield from value


def project_of(name: str) -> str:
    """Returns the id of the project that a name begins with, which may be "-"; "" if with none."""
    found = _NAME.fullmatch(name)
    return "" if found is None else found[1]


def _project_of(field: str, name: str) -> str:
    project_id = project_of(name)
    if not project_id:
        raise bad_field(
            field, "BAD_NAME", f"must be a name that begins with projects/, not {name[:200]!r}"
        )
    return project_id


def _visible(principal: Principal, project_id: str) -> Role.ValueType:
    role = principal.role_in(project_id)
    if not role and project_id != EVERYWHERE:
        raise not_found(f"projects/{project_id}")
    return role


def _missing_role(principal: Principal, method: str, wanted: str) -> PermissionDenied:
    name = method.rsplit("/", 1)[-1]
    return PermissionDenied(
        f"{name} takes {wanted}, which {principal.subject} does not have; ask an administrator",
        reason="MISSING_ROLE",
        metadata={"method": method.strip("/"), "subject": principal.subject},
    )
