"""What a job runs on the Ray cluster: the worker processes of one machine, or of several."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf import json_format

from detflow.held import hold, remove_abandoned
from detflow.names import last_segment
from detflow.processes import dying_with_parent
from detflow.settings import Settings
from detflow.v1.worker_pb2 import WorkerSpec
from services.trainer.executors import Device
from services.trainer.executors.local import WORKER_COMMAND

ENTRYPOINT = "python -m services.trainer.executors.ray_job"
SPEC_VARIABLE = "DETFLOW_WORKER_SPEC"
NUM_CPUS = {Device.CPU: 2, Device.CUDA: 1}
"""Per process: one computes, and where no GPU does that, another makes images meanwhile."""

_PLACEMENT_SECONDS = 300.0
_EXPLANATION_SECONDS = 30.0

T = TypeVar("T")


def main() -> int:
    """Runs what the job is told; returns the exit code of the worker's first process."""
    content = os.environ[SPEC_VARIABLE]
    message = json_format.Parse(content, WorkerSpec())
    if message.resources.num_nodes > 1:
        return _run_on_machines(content, message)
    # Ray sends the signal to the worker as well, which ends in its own time.
    signal.signal(signal.SIGTERM, lambda *_: None)
    return run_rank(content, 0)


def run_rank(content: str, rank: int, address: str = "") -> int:
    """Runs the first worker process of this machine; returns its exit code."""
    message = json_format.Parse(content, WorkerSpec())
    trainings = Settings.load().data_dir / "trainings"
    remove_abandoned(trainings.glob("*/*"))  # of workers that were killed on this machine
    name = f"{message.attempt}-{rank}"
    folder = trainings / last_segment(message.training) / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    held = hold(folder)
    try:
        (folder / "spec.json").write_text(content)
        arguments = [str(folder / "spec.json"), f"--rank={rank}", f"--address={address}"]
        command = dying_with_parent([*WORKER_COMMAND, *arguments])
        process = subprocess.Popen(command, cwd=folder, pass_fds=(held.fileno(),))
        code = process.wait()
        return code if code >= 0 else 128 - code  # as a shell says it
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        held.close()


def _run_on_machines(content: str, message: WorkerSpec) -> int:
    """Places a task on each machine, which runs the worker processes there."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    num_nodes, number = message.resources.num_nodes, message.resources.num_devices_per_node or 1
    device = Device.CPU if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else Device.CUDA
    num_cpus, num_gpus = number * NUM_CPUS[device], number if device is Device.CUDA else 0
    ray.init()
    group = placement_group([{"CPU": num_cpus, "GPU": num_gpus}] * num_nodes, "STRICT_SPREAD")
    if not group.wait(_PLACEMENT_SECONDS):
        print(f"the cluster has no {num_nodes} machines with {number} free {device} slots each")
        return 1

    def on(machine: int, function: Callable[..., T], *arguments: object) -> Any:
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=machine)
        remote: Any = ray.remote(function).options(
            num_cpus=num_cpus, num_gpus=num_gpus, max_retries=0, scheduling_strategy=place
        )
        return remote.remote(*arguments)

    address = ray.get(on(0, free_address))
    tasks = [
        on(machine, run_rank, content, machine * number, address) for machine in range(num_nodes)
    ]
    ray.wait(tasks)  # until the first of them ends
    # If it is not that of rank 0, rank 0 notices and says why. When this ends, all others do.
    ended, _ = ray.wait(tasks[:1], timeout=_EXPLANATION_SECONDS)
    return int(ray.get(ended[0])) if ended else 1


def free_address() -> str:
    """Returns host:port at which the other machines of a cluster can reach this one."""
    from ray.util import get_node_ip_address

    host: str = get_node_ip_address()  # type: ignore[no-untyped-call]
    with socket.create_server((host, 0)) as listener:
        return f"{host}:{listener.getsockname()[1]}"


if __name__ == "__main__":
    # Under its name, which is how the processes of the cluster import what they are to run.
    from services.trainer.executors import ray_job

    sys.exit(ray_job.main())
