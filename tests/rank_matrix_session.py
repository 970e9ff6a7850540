"""Run as much of the matrix of kills on several ranks as one likes, and print tables.

    python tests/rank_matrix_session.py [NUMBER | all] [--seed N] [--only TEXT]

The cases come in a random order that the seed fixes, those first that together have every pair of values. All of them
take hours. `--only` takes those whose name contains the text; the name is printed if a case fails. Then random
schedules of ranks and batch sizes are tried, one for every ten cases, and it is measured how long ranks live on when
another one dies, raises or hangs. Exits with status 1 if anything differs, is lost, repeated or outlives the others for
long.
"""

import dataclasses
import itertools
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cases import Matrix, Result, read_arguments, table
from elastic import Phase, Sample, repeated, run_phases
from rank_job import RankJob
from rank_matrix import POINTS, RankCase, reference_of, run_case, run_whole, valid_cases
from rank_runner import RankRunner

NUM_SAMPLES = 24
TIMEOUT_S = 3.0
WORLD_SIZES = (1, 2, 3, 4)


MATRIX = Matrix(valid_cases(), RankRunner, reference_of, run_whole, run_case)


def groups_of(results: Sequence[Result[RankCase]]) -> dict[str, list[Result[RankCase]]]:
    """Return the results of each point, each number of ranks and strategy, and all."""
    groups = {point: [r for r in results if r.case.point == point] for point in POINTS}
    for result in results:
        groups.setdefault(f"{result.case.world_size} x {result.case.strategy}", []).append(result)
    return {**groups, "all": list(results)}


def random_schedule(chance: random.Random) -> list[Phase]:
    """Return starts on random numbers of ranks with random batch sizes; the last is one that comes out even."""
    phases, batch = [], 0
    for _ in range(chance.randint(2, 5)):
        batch += chance.randint(2, 4)
        signal = chance.choice(["SIGTERM", "SIGKILL"])
        phases.append(Phase(chance.choice(WORLD_SIZES), batch, chance.randint(1, 2), signal))
        batch += signal == "SIGTERM"  # it stops after the next batch
    return [*phases, Phase(1)]


def try_schedules(number: int, seed: int, folder: Path) -> int:
    """Try random schedules, print them and what is wrong with them, and return how many of them were wrong."""
    num_wrong = 0
    job = RankJob("", "iteration", 40, 1, None, 1, has_batch_norm=False, num_samples=NUM_SAMPLES)
    with RankRunner() as runner:
        whole = dataclasses.replace(job, root=tempfile.mkdtemp(dir=folder), total_steps=100)
        alone = run_phases(runner, whole, [Phase(1, batch_size=4)])  # more epochs than any of the others has
        for n in range(number):
            chance = random.Random(f"{seed} {n}")
            phases, strategy = random_schedule(chance), chance.choice(["ddp", "fsdp"])
            root = tempfile.mkdtemp(dir=folder)
            wrong = _wrong_of(runner, dataclasses.replace(job, root=root, strategy=strategy), phases, alone)
            num_wrong += bool(wrong)
            shown = ", ".join(
                f"{p.world_size} x {p.batch_size} {p.signal if p.batch else ''}" for p in phases
            )
            print(f"{strategy}: {shown}: {wrong or 'nothing is lost'}", flush=True)
    return num_wrong


def _wrong_of(
    runner: RankRunner, job: RankJob, phases: Sequence[Phase], alone: Mapping[int, Sequence[Sample]]
) -> str:
    try:
        epochs = run_phases(runner, job, phases)
    except AssertionError as error:
        return str(error)
    for epoch in list(epochs)[:-1]:  # the last is not whole
        if missing := set(alone[epoch]) - set(epochs[epoch]):
            return f"epoch {epoch} lacks {sorted(index for index, _ in missing)}, or has them otherwise"
        most = max(phase.world_size * phase.batch_size for phase in phases)
        if repeated(epochs[epoch]) >= most:  # with which the last step of an epoch is filled up at most
            return f"epoch {epoch} has {repeated(epochs[epoch])} samples twice"
    return ""


def lives(folder: Path) -> Iterator[str]:
    """Yield lines: how long the other ranks live when one dies."""
    yield f"{'a rank ...':10}{'ranks':>7}{'victim':>8}{'workers':>9}{'the last of the others ended after':>36}"
    with RankRunner() as runner:
        for fate, world_size, workers in itertools.product(("SIGKILL", "raise", "hang"), (2, 4), (0, 2)):
            for victim in (0, world_size - 1):
                job = RankJob(tempfile.mkdtemp(dir=folder), "iteration", 12, 1, 3, 2, workers=workers)
                timeout_s = TIMEOUT_S if fate == "hang" else None
                job = dataclasses.replace(job, world_size=world_size, signal=fate, dist_timeout_s=timeout_s)
                answer = runner(dataclasses.replace(job, kill=("train_step", 5), victims=(victim,)))
                met_s = Path(job.root, f"rank{victim}", "kills.txt").stat().st_mtime
                lived = f"{answer['ended_s'] - met_s:.1f} s" if not answer["was_killed"] else "DID NOT"
                yield f"{fate:10}{world_size:7}{victim:8}{workers:9}{lived:>36}"


def main() -> None:
    """Read the arguments, run, print, and exit."""
    arguments = read_arguments(__doc__, 200)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        results = MATRIX.run(arguments, Path(folder))
        print("\n".join(table(groups_of(results))), flush=True)
        print(f"\nrandom schedules, {NUM_SAMPLES} samples\n", flush=True)
        num_wrong = try_schedules(len(results) // 10 + 1, arguments.seed, Path(folder))
        print(f"\ndist_timeout_s={TIMEOUT_S:.0f} where a rank hangs\n")
        rows = []
        for row in lives(Path(folder)):
            print(row, flush=True)
            rows.append(row)
    sys.exit(any(r.differing for r in results) or num_wrong > 0 or any("DID NOT" in row for row in rows))


if __name__ == "__main__":
    main()
