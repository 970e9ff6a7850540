"""What the matrices share: an order of cases that soon has every pair of values, sessions that run many, a table."""

import argparse
import functools
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

C = TypeVar("C")
R = TypeVar("R")
W = TypeVar("W")
NUM_RUNNERS = 2


def in_seeded_order(cases: Sequence[C], seed: int) -> list[C]:
    """Return the cases in a random order, but first those that together have every pair of values that occurs."""
    shuffled = random.Random(seed).sample(cases, len(cases))
    missing = dict.fromkeys(pair for case in shuffled for pair in pairs_of(case))
    first: dict[C, None] = {}
    while missing:
        wanted = next(iter(missing))
        some = itertools.islice((case for case in shuffled if wanted in pairs_of(case)), 20)
        best = max(some, key=lambda case: sum(pair in missing for pair in pairs_of(case)))
        first[best] = None
        for pair in pairs_of(best):
            missing.pop(pair, None)
    return [*first, *(case for case in shuffled if case not in first)]


def pairs_of(case: object) -> list[tuple[tuple[str, object], ...]]:
    """Return every pair of a case's settings: ((name, value), (name, value))."""
    return list(itertools.combinations(vars(case).items(), 2))


@dataclass(frozen=True)
class Result(Generic[C]):
    """What became of a case: the names of what differs, or the error in their place."""

    case: C
    num_kills: int
    differing: tuple[str, ...]


@dataclass(frozen=True)
class Matrix(Generic[C, R, W]):
    """How the cases of a matrix are run.

    Attributes:
        cases: all of them.
        make_runner: makes what runs jobs in processes.
        reference_of: gives the case whose uninterrupted run a case must end as.
        run_whole: runs that in an empty folder, and returns what a case is compared with.
        run_case: runs a case in an empty folder, given a function from a reference to what `run_whole` returned;
            returns the names of what differs and the number of kills.
    """

    cases: Sequence[C]
    make_runner: Callable[[], AbstractContextManager[R]]
    reference_of: Callable[[C], C]
    run_whole: Callable[[R, C, Path], W]
    run_case: Callable[[R, C, Path, Callable[[C], W]], tuple[list[str], int]]

    def run(self, arguments: argparse.Namespace, folder: Path) -> list[Result[C]]:
        """Run the cases that the command line asks for, and say of how many, how long it took, and what differs."""
        began_s = time.monotonic()
        shares = in_shares(chosen(self.cases, self.reference_of, arguments))
        with ThreadPoolExecutor(NUM_RUNNERS) as pool:
            parts = list(pool.map(lambda share: self._run_share(share, folder), shares))
        results = [result for part in parts for result in part]
        took_s = time.monotonic() - began_s
        print(f"\n{len(results)} of {len(self.cases)} cases, seed {arguments.seed}, {took_s:.0f} s\n")
        return results

    def _run_share(self, cases: Sequence[C], folder: Path) -> list[Result[C]]:
        """Run some cases one after the other, in processes of a runner of their own."""

        @functools.cache
        def whole(case: C) -> W:
            return self.run_whole(runner, case, Path(tempfile.mkdtemp(dir=folder)))

        results = []
        with self.make_runner() as runner:
            for case in cases:
                with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as root:
                    try:
                        names, num_kills = self.run_case(runner, case, Path(root), whole)
                    except AssertionError as error:
                        names, num_kills = [str(error)], 0
                results.append(Result(case, num_kills, tuple(names)))
                if names:
                    print(f"DIFFERS {case}: {', '.join(names)}", flush=True)
        return results


def read_arguments(description: str | None, number: int) -> argparse.Namespace:
    """Read the command line: how many cases, by default `number`, of which seed, and which of them."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("number", nargs="?", default=str(number), help=f"how many cases; {number} by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    return parser.parse_args()


def chosen(every: Sequence[C], reference_of: Callable[[C], C], arguments: argparse.Namespace) -> list[C]:
    """Return the cases that are asked for. Those with the same uninterrupted run go together: it is run once."""
    cases = [case for case in in_seeded_order(every, arguments.seed) if arguments.only in str(case)]
    if arguments.number != "all":
        cases = cases[: int(arguments.number)]
    return sorted(cases, key=lambda case: str(reference_of(case)))


def in_shares(cases: Sequence[C]) -> list[Sequence[C]]:
    """Return one part of the cases for each runner."""
    size = len(cases) // NUM_RUNNERS + 1
    return [cases[start : start + size] for start in range(0, len(cases), size)]


def table(groups: Mapping[str, Sequence[Result[C]]]) -> Iterator[str]:
    """Yield lines: a row for each group of results, by name."""
    yield f"{'':22}{'cases':>7}{'kills':>7}{'differ':>8}  what"
    for name, group in groups.items():
        what = ", ".join(sorted({part for result in group for part in result.differing}))
        num_kills = sum(result.num_kills for result in group)
        num_differing = sum(bool(result.differing) for result in group)
        yield f"{name:22}{len(group):7}{num_kills:7}{num_differing:8}  {what[:200]}"
