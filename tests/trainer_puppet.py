"""A worker whose strings the test pulls: it speaks the real record protocol and trains nothing.

`python trainer_puppet.py SPEC` reads a WorkerSpec, says hello on test.puppet.hello and does what it
is told by requests on test.puppet.{training id}.{attempt}.
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import nats
from google.protobuf import json_format
from google.rpc import error_details_pb2
from nats.aio.msg import Msg

from detflow.v1 import worker_pb2
from detflow.v1.common_pb2 import StoredObject

# A failure's details can be read only where their type is known.
DETAILS = error_details_pb2.ErrorInfo


async def main(text: str) -> None:
    spec = json_format.Parse(text, worker_pb2.WorkerSpec())
    training_id = spec.training.rsplit("/", 1)[1]
    address = f"{training_id}.{spec.attempt}"
    nc = await nats.connect(os.environ["DETFLOW_NATS_URL"])
    js = nc.jetstream()
    seq = 0
    leave: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def publish(record: worker_pb2.WorkerRecord) -> None:
        record.training, record.attempt = spec.training, spec.attempt
        await js.publish(
            f"detflow.records.{address}",
            record.SerializeToString(),
            headers={"Nats-Msg-Id": f"{training_id}/{spec.attempt}/{record.seq}"},
        )

    async def obey(msg: Msg) -> None:
        nonlocal seq
        order = json.loads(msg.data)
        answer: dict[str, object] = {}
        is_last = "failed" in order.get("record", {})
        if is_last:  # the trainer ends us as soon as it has read it: answer while there is time
            await msg.respond(b"{}")
            await nc.flush()
        if "record" in order:
            seq += 1
            record = json_format.ParseDict(order["record"], worker_pb2.WorkerRecord())
            record.seq = record.seq or seq
            await publish(record)
        if "lease" in order:
            request = json_format.ParseDict(order["lease"], worker_pb2.LeaseRequest())
            request.attempt = request.attempt or spec.attempt
            reply = await nc.request(
                f"detflow.lease.{training_id}", request.SerializeToString(), timeout=5
            )
            response = worker_pb2.LeaseResponse.FromString(reply.data)
            answer = {"fenced": response.fenced, "stop": response.stop_mode}
        if "ignore_sigterm" in order:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if "print" in order:
            print(order["print"], flush=True)
        if not is_last:
            await msg.respond(json.dumps(answer).encode())
        if "exit" in order:
            await nc.flush()
            leave.set_result(order["exit"])

    await nc.subscribe(f"test.puppet.{address}", cb=obey)
    hello = {
        "attempt": spec.attempt,
        "pid": os.getpid(),
        "training": spec.training,
        "spec": json_format.MessageToDict(spec),
        "checkpoint": spec.checkpoint.epoch if spec.HasField("checkpoint") else 0,
        "environment": sorted(os.environ),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "folder": os.getcwd(),
    }
    await nc.flush()
    await nc.publish("test.puppet.hello", json.dumps(hello).encode())
    code = await leave
    await nc.close()
    sys.exit(code)


def stored(key: str) -> dict[str, object]:
    """An object reference as the records carry it; nobody reads the object."""
    return json_format.MessageToDict(StoredObject(key=key, size_bytes=1, sha256="00" * 32))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]).read_text()))
