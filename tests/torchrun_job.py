"""The run of rank_job.py, started by torchrun, and killed or stopped by an error as its attempts go.

    torchrun ... torchrun_job.py JOB

JOB is JSON: the fields of a `RankJob`, and under `fates` for each attempt but the last [victim, batch, signal].
"""

import faulthandler
import json
import os
import sys
from pathlib import Path

import rank_job

from helios.trainer.distributed import get_global_rank, get_local_rank


class NotedModel(rank_job.RankModel):
    """Notes what number each process has, in the run and on its machine."""

    def on_training_epoch_start(self, epoch: int) -> None:
        super().on_training_epoch_start(epoch)
        Path(self._job.root, "numbers.txt").write_text(f"{get_global_rank()} {get_local_rank()}")


def main() -> None:
    """Train in this process, which is a rank."""
    faulthandler.register(12)
    values = json.loads(sys.argv[1])
    fates, attempt = values.pop("fates"), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    victims, kill, signal = (), None, "SIGKILL"
    if attempt < len(fates):
        victim, batch, signal = fates[attempt]
        victims, kill = (victim,), ("train_step", batch)
    job = rank_job.RankJob(**{**values, "victims": victims, "kill": kill, "signal": signal})
    is_finished = rank_job.run(job, NotedModel)
    sys.exit(0 if is_finished else os.EX_TEMPFAIL)


if __name__ == "__main__":
    main()
