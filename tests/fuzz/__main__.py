"""Fuzzes a stack of its own: `python -m tests.fuzz --cases 50000 --seed 1`.

Prints the seed first; with it, `--case N` sends one case again.
"""

import argparse
import asyncio
import random
import signal
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
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    numbers = range(options.cases) if options.case is None else [options.case]
    with tempfile.TemporaryDirectory(prefix="detflow-fuzz-") as folder:
        stack = start(Path(folder), free_base_port())
        try:
            filled = world.make(stack, train=True)
            report = asyncio.run(fuzzing.run(filled, options.seed, numbers))
        finally:
            end(stack, signal.SIGTERM)
    return show(report, options.seed)


def show(report: fuzzing.Report, seed: int) -> int:
    """Prints a report; returns the exit code."""
    total = report.counts.total()
    print(f"{total} cases in {report.seconds:.0f} s: {total / report.seconds:.0f} a second")
    codes: dict[str, int] = {}
    for what, number in report.counts.items():
        code = what.rpartition(" ")[2]
        codes[code] = codes.get(code, 0) + number
    print("answers:", ", ".join(f"{code} {n}" for code, n in sorted(codes.items())))
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
