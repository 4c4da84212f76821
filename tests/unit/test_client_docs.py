"""What `help` says of the SDK."""

import inspect
import re

import detflow
from detflow.client.threads import methods_of


def test_every_argument_of_every_call_is_explained() -> None:
    missing = []
    with detflow.Client("127.0.0.1:1", environ={}) as client:
        for noun, calls in client.nouns().items():
            for method in methods_of(type(calls)):
                doc = inspect.getdoc(getattr(calls, method)) or ""
                missing += [
                    f"{noun}.{method}: {name}"
                    for name in inspect.signature(getattr(calls, method)).parameters
                    if not re.search(rf"^Args:\n(.*\n)*?    {name}: ", doc, re.MULTILINE)
                ]
    assert not missing
