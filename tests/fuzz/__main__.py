"""Fuzzes a stack of its own: `python -m tests.fuzz --cases 50000 --seed 1`.

Prints the seed first; with it, `--case N` sends one case again.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz import fuzzing, world
from tests.stack_rig import end, free_base_port, start

_SHOWN = 10
_MAY_GROW_MIB = 64


def main() -> int:
    """Returns 1 if a case had a problem."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--cases", type=int, default=50_000, help="how many")
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    parser.add_argument("--case", type=int, help="send only this one")
    parser.add_argument(
        "--conform", action="store_true", help="also compare HTTP with the OpenAPI document"
    )
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    numbers = range(options.cases) if options.case is None else [options.case]
    with tempfile.TemporaryDirectory(prefix="detflow-fuzz-") as folder:
        stack = start(Path(folder), free_base_port())
        try:
            filled = world.make(stack, train=True)
            report = asyncio.run(fuzzing.run(filled, options.seed, numbers))
            differs = options.conform and conformance(filled, options.seed, "-n", "30")
        finally:
            end(stack, signal.SIGTERM)
    return show(report, options.seed) or int(differs)


def conformance(filled: world.World, seed: int, *arguments: str) -> int:
    """Has schemathesis compare a stack with its OpenAPI document; returns the exit code.

    Args:
        filled: The stack, with something in it.
        seed: Of its cases.
        arguments: More for `schemathesis run`.
    """
    command = Path(sys.executable).with_name("schemathesis")
    done = subprocess.run(
        [
            *(command, "run", f"http://127.0.0.1:{filled.http_port}/openapi.json"),
            *("-H", f"Authorization: Bearer {filled.token}", "--seed", str(seed)),
            # Event streams have no end; over_http.py reads their beginnings.
            *("--exclude-path-regex", ":watch$", "--suppress-health-check", "all"),
            # What the document allows may still be refused: it does not know what there is.
            *("--exclude-checks", "positive_data_acceptance", "--warnings", "off"),
            *("--no-shrink", "--continue-on-failure", "--request-timeout", "60", *arguments),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "SCHEMATHESIS_HOOKS": "tests.fuzz.conformance",
            "DETFLOW_FUZZ_NAMES": json.dumps(filled.names.names),
        },
        check=False,
    )
    return done.returncode


def show(report: fuzzing.Report, seed: int) -> int:
    """Prints a report; returns the exit code."""
    total = report.counts.total()
    print(f"{total} cases in {report.seconds:.0f} s: {total / report.seconds:.0f} a second")
    codes: dict[str, int] = {}
    for what, number in report.counts.items():
        code = what.rpartition(" ")[2]
        codes[code] = codes.get(code, 0) + number
    print("answers:", ", ".join(f"{code} {n}" for code, n in sorted(codes.items())))
    slow = [what for what in report.counts if what.endswith(" slow")]
    print("not answered in time:", ", ".join(slow) or "none")
    grown = []
    for name, (before, after) in report.memory.items():
        print(f"{name}: {before} MiB after a quarter, {after} MiB at the end")
        if after - before > _MAY_GROW_MIB:
            grown.append(name)
    for number, outcome in report.problems[:_SHOWN]:
        print(f"\ncase {number} (--seed {seed} --case {number}): {outcome.what}")
        print(f"  {outcome.problem}\n  {outcome.sent}")
    away = [name for name, serves in report.serving.items() if not serves]
    print(f"\n{len(report.problems)} problems; not serving: {away}; grown: {grown}")
    return 1 if report.problems or away or grown else 0


if __name__ == "__main__":
    sys.exit(main())
