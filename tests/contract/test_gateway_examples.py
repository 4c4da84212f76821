"""What the document and /docs show by example fits the schemas, and works."""

import html
import re
import shlex
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from gateway import examples, openapi, pages
from gateway.routes import bindings
from tests.gateway_rig import Rig, running

DOCUMENT = openapi.document(bindings())
OPERATIONS = [
    (method.upper(), path, operation)
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running() as one:
        yield one


def shown() -> Iterator[tuple[str, Any, Any]]:
    """Yields every example with the schema it is of."""
    for _, _, operation in OPERATIONS:
        for parameter in operation["parameters"]:
            if "example" in parameter:
                where = f"{operation['operationId']} {parameter['name']}"
                yield where, parameter["schema"], parameter["example"]
        for content in operation.get("requestBody", {}).get("content", {}).values():
            if "example" in content:
                yield operation["operationId"], content["schema"], content["example"]


def test_every_example_fits_its_schema() -> None:
    found = list(shown())
    assert len(found) > 100
    for where, schema, example in found:
        validator = Draft202012Validator(schema | {"components": DOCUMENT["components"]})
        errors = [error.message for error in validator.iter_errors(example)]
        assert not errors, where
    with_body = {one["operationId"] for _, _, one in OPERATIONS if "requestBody" in one}
    assert examples.BODIES.keys() <= with_body


async def test_every_curl_line_is_taken_by_gateway_and_service(
    rig: Rig, subtests: pytest.Subtests
) -> None:
    for method, path, operation in OPERATIONS:
        with subtests.test(operation["operationId"]):
            words = shlex.split(examples.curl(method, path, operation))
            headers = dict(words[i + 1].split(": ") for i, word in enumerate(words) if word == "-H")
            url = next(word for word in words if word.startswith(examples.SERVER))
            body = words[words.index("-d") + 1] if "-d" in words else ""
            answer = await rig.http.request(
                words[words.index("-X") + 1] if "-X" in words else "GET",
                url.removeprefix(examples.SERVER),
                headers=headers,
                content=body if "-d" in words else b"",
            )
            assert answer.status_code == 200, answer.text
            # The resource of a file that does not say what it is is asked for last.
            assert operation["operationId"] in [name for name, _, _ in rig.backend.calls[-2:]]


def test_page_of_operations_shows_each_with_its_line_and_answers() -> None:
    page = pages.docs(DOCUMENT)
    assert page.count("<pre>") == len(OPERATIONS)
    for method, path, operation in OPERATIONS:
        assert html.escape(examples.curl(method, path, operation)) in page
    for tag in DOCUMENT["tags"]:
        assert f'href="#{tag["name"]}"' in page and f'<h2 id="{tag["name"]}"' in page
    assert not re.search(r"<script|\{project\}'", page)
    assert "Other answers: 400, 401, 403, 404" in page
