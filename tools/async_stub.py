"""Writes detflow/client/aio.pyi: the methods of `Client` as `AsyncClient` has them.

`--check` fails if the committed file differs.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detflow.client import Client, aio
from detflow.client.threads import CALLS, gives_iterator, methods_of

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "detflow" / "client" / "aio.pyi"
_HEAD = '''"""The client for asyncio. Made by tools/async_stub.py, not to be edited."""
import os
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Self
'''
_CLIENT = '''
class AsyncClient:
    """{doc}"""

    address: str
    {nouns}

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
    {methods}
    async def close(self) -> None:
        """Closes the connection; running calls and watches end."""
    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
'''


def main() -> int:
    """Writes or checks the file; returns the exit code."""
    text = stub()
    if "--check" in sys.argv[1:]:
        if TARGET.read_text(encoding="utf-8") != text:
            print(f"{TARGET} does not fit detflow/client: run python tools/async_stub.py")
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    return 0


def stub() -> str:
    """Returns what the file is to hold."""
    with Client("127.0.0.1:1", environ={}) as client:
        nouns = {name: type(noun) for name, noun in client.nouns().items()}
    imports: set[str] = set()
    classes = []
    for noun in nouns.values():
        methods = "\n".join(_methods(noun, methods_of(noun), imports))
        classes.append(f'class {noun.__name__}:\n    """{noun.__doc__}"""\n{methods}\n')
    own = "\n".join(_methods(Client, CALLS, imports)).strip()
    fields = "\n    ".join(f"{name}: {noun.__name__}" for name, noun in nouns.items())
    doc = aio.AsyncClient.__doc__ or ""
    text = _CLIENT.replace("{doc}", doc).replace("{nouns}", fields).replace("{methods}", own)
    text = "\n".join([_HEAD, *sorted(imports), *classes, text])
    for command in (["check", "--fix", "--quiet", "--select", "I,UP"], ["format"]):
        text = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(TARGET), "-"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
    return text


def _methods(noun: type, names: Any, imports: set[str]) -> Iterator[str]:
    """Yields the declarations of methods, and adds the imports of what they name."""
    module = inspect.getmodule(noun)
    assert module is not None
    tree = ast.parse(inspect.getsource(module))
    [definition] = [
        one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == noun.__name__
    ]
    for node in definition.body:
        if not isinstance(node, ast.FunctionDef) or node.name not in names:
            continue
        found = _declaration(node, gives_iterator(getattr(noun, node.name)))
        for one in ast.walk(found):
            if isinstance(one, ast.Name) and not hasattr(builtins, one.id):
                imports.add(_import_of(one.id, tree, module.__name__))
        yield "    " + ast.unparse(ast.fix_missing_locations(found)).replace("\n", "\n    ")


def _declaration(
    node: ast.FunctionDef, is_iterator: bool
) -> ast.FunctionDef | ast.AsyncFunctionDef:
    arguments = node.args
    arguments.defaults = [ast.Constant(...) for _ in arguments.defaults]
    arguments.kw_defaults = [one and ast.Constant(...) for one in arguments.kw_defaults]
    first, *_ = (ast.get_docstring(node) or "").partition("\n")
    body: list[ast.stmt] = [ast.Expr(ast.Constant(first))]
    if is_iterator:
        assert isinstance(node.returns, ast.Subscript)
        item = node.returns.slice  # of Iterator[X], or of Generator[X, None, None]
        item = item.elts[0] if isinstance(item, ast.Tuple) else item
        items = ast.Tuple([item, ast.Constant(None)])
        returns = ast.Subscript(ast.Name("AsyncGenerator"), items)
        return ast.FunctionDef(node.name, arguments, body, [], returns)
    return ast.AsyncFunctionDef(node.name, arguments, body, [], node.returns)


def _import_of(name: str, tree: ast.Module, module: str) -> str:
    """Returns the import of what a module calls `name`."""
    for one in tree.body:
        if isinstance(one, ast.ImportFrom) and name in [alias.name for alias in one.names]:
            return f"from {one.module} import {name}"
        if isinstance(one, ast.Import) and name in [alias.name for alias in one.names]:
            return f"import {name}"
    if name == "AsyncGenerator":
        return "from collections.abc import AsyncGenerator"
    return f"from {module} import {name}"


if __name__ == "__main__":
    sys.exit(main())
