"""Run as much of the matrix of kills and resumes as one likes, and print a table.

    python tests/matrix_session.py [NUMBER | all] [--seed N] [--only TEXT]

The cases come in a random order that the seed fixes, those first that together have every pair of values. All of them
take hours. `--only` takes those whose name contains the text; the name is printed if a case fails. Exits with status 1
if anything differs.
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from job_runner import JobRunner
from matrix import (
    POINTS,
    Case,
    in_seeded_order,
    job_of,
    kills_of,
    reference_of,
    run_case,
    run_whole,
    valid_cases,
)

NUM_RUNNERS = 2


@dataclass(frozen=True)
class Result:
    """What became of a case: the names of what differs, or the error in their place."""

    case: Case
    num_kills: int
    differing: tuple[str, ...]


def run_share(cases: Iterable[Case], folder: Path) -> list[Result]:
    """Run some cases one after the other, in processes of a server of their own."""

    @functools.cache
    def whole(case: Case) -> dict[str, str]:
        with tempfile.TemporaryDirectory(dir=folder) as root:
            return run_whole(runner, case, Path(root))

    results = []
    with JobRunner() as runner:
        for case in cases:
            with tempfile.TemporaryDirectory(dir=folder) as root:
                try:
                    names = run_case(runner, case, Path(root), whole)
                except AssertionError as error:
                    names = [str(error)]
            num_kills = len(kills_of(case, job_of(case, Path(root))))
            results.append(Result(case, num_kills, tuple(names)))
            if names:
                print(f"DIFFERS {case}: {', '.join(names)}", flush=True)
    return results


def table(results: list[Result]) -> list[str]:
    """Return lines: a row for each point, and the sum."""
    rows = [f"{'killed':22}{'cases':>7}{'kills':>7}{'differ':>8}  what"]
    groups = {point: [r for r in results if r.case.point == point] for point in POINTS}
    for name, group in {**groups, "all": results}.items():
        what = ", ".join(sorted({part for r in group for part in r.differing}))
        num_kills, num_differing = sum(r.num_kills for r in group), sum(bool(r.differing) for r in group)
        rows.append(f"{name:22}{len(group):7}{num_kills:7}{num_differing:8}  {what[:200]}")
    return rows


def main() -> None:
    """Read the arguments, run, print, and exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("number", nargs="?", default="400", help="how many cases; 400 by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    every = valid_cases()
    cases = [case for case in in_seeded_order(every, arguments.seed) if arguments.only in str(case)]
    if arguments.number != "all":
        cases = cases[: int(arguments.number)]
    # Cases with the same uninterrupted run go together: it is run once.
    cases = sorted(cases, key=lambda case: str(reference_of(case)))
    half = len(cases) // NUM_RUNNERS + 1
    shares = [cases[start : start + half] for start in range(0, len(cases), half)]
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(NUM_RUNNERS) as pool:
        parts = list(pool.map(lambda share: run_share(share, Path(folder)), shares))
    results = [result for part in parts for result in part]
    print(
        f"\n{len(results)} of {len(every)} cases, seed {arguments.seed}, {time.monotonic() - began_s:.0f} s\n"
    )
    print("\n".join(table(results)))
    sys.exit(any(result.differing for result in results))


if __name__ == "__main__":
    main()
