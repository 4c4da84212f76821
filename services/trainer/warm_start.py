"""Weights that a training begins with: found and checked when it is started."""

from __future__ import annotations

from detflow.errors import FailedPrecondition, not_found
from detflow.names import project_of
from detflow.postgres import Connection
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.training_pb2 import WarmStart
from services.trainer import checkpoints, store, weights
from services.trainer.domain import Training


async def find_weights(conn: Connection, project: str, warm_start: WarmStart) -> StoredObject:
    """Returns the object a warm start means; uploaded weights stay until the transaction ends.

    Raises:
        NotFound: The training or the weights are not there, or of another project.
        FailedPrecondition: NO_WEIGHTS, the training has none yet.
    """
    name = warm_start.training or warm_start.weights
    if project_of(name) != project:
        raise not_found(name)
    if warm_start.weights:
        return (await weights.get_weights(conn, name, lock=True)).object
    training = await store.find_training(conn, name)
    if training.weights is None:
        raise FailedPrecondition(
            f"{name} is {training.state} and has no weights yet; wait until it is evaluated, or"
            " begin with those of another",
            reason="NO_WEIGHTS",
            metadata={"training": name},
        )
    return training.weights


async def find_model(conn: Connection, project: str, warm_start: WarmStart) -> str:
    """Returns the id of the model whose weights a warm start means; empty if they don't say.

    Raises:
        NotFound: The training or the weights are not there, or of another project.
    """
    name = warm_start.training or warm_start.weights
    if project_of(name) != project:
        raise not_found(name)
    if warm_start.weights:
        return (await weights.get_weights(conn, name)).model
    return (await store.find_training(conn, name)).model


async def check_still_there(conn: Connection, training: Training) -> None:
    """Checks that a training to be resumed has what it begins with.

    Raises:
        FailedPrecondition: WARM_START_GONE, the weights were deleted before it took them over.
    """
    if training.warm_start is None or not training.warm_start.weights:
        return
    if await checkpoints.get_newest(conn, training.id) is not None:
        return
    if not await weights.is_there(conn, training.warm_start.weights):
        raise FailedPrecondition(
            f"{training.warm_start.weights}, which {training.name} begins with, was deleted; start"
            " another training",
            reason="WARM_START_GONE",
            metadata={"weights": training.warm_start.weights},
        )
