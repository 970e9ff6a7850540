"""Run as much of the matrix of kills and resumes as one likes, and print a table.

    python tests/matrix_session.py [NUMBER | all] [--seed N] [--only TEXT]

The cases come in a random order that the seed fixes, those first that together have every pair of values. All of them
take hours. `--only` takes those whose name contains the text; the name is printed if a case fails. Exits with status 1
if anything differs.
"""

import sys
import tempfile
from pathlib import Path

from cases import Matrix, read_arguments, table
from job_runner import JobRunner
from matrix import POINTS, reference_of, run_case, run_whole, valid_cases

MATRIX = Matrix(valid_cases(), JobRunner, reference_of, run_whole, run_case)


def main() -> None:
    """Read the arguments, run, print, and exit."""
    arguments = read_arguments(__doc__, 400)
    with tempfile.TemporaryDirectory() as folder:
        results = MATRIX.run(arguments, Path(folder))
    groups = {point: [r for r in results if r.case.point == point] for point in POINTS}
    print("\n".join(table({**groups, "all": results})))
    sys.exit(any(result.differing for result in results))


if __name__ == "__main__":
    main()
