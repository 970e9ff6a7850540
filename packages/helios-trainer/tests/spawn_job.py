"""Trainers in several processes: spawned by this script, or this script in each process of torchrun.

Arguments: the name of a scenario below, a folder, and a file for what it returns.
"""

import multiprocessing
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import trainer_kit as kit

import helios.trainer.distributed as hd
from helios.trainer import Plugin
from helios.trainer._launch import request_stop

FOLDER = Path(sys.argv[2])


class PassedError(Exception):
    pass


class NotedData(kit.Data):
    def prepare_data(self):
        with (FOLDER / "prepared").open("a") as file:
            file.write("parent\n" if multiprocessing.parent_process() is None else "child\n")


class Passing(Plugin):
    """Lets exceptions pass, from where plug-ins may do it."""

    def __init__(self):
        super().__init__("passing")

    def configure_trainer(self, trainer):
        trainer.train_exceptions.append(PassedError)

    def on_training_end(self):
        self.trainer.queue.put(["plugin", self.trainer.rank])


class RankNet(kit.Net):
    fails_in = None

    def on_training_end(self):
        trainer = self.trainer
        same = trainer.plugins["passing"].trainer is trainer
        info = [self.rank, trainer.rank, trainer.local_rank, hd.get_world_size(), self.is_distributed, same]
        trainer.queue.put(["model", info, self.net[0].weight])
        if self.fails_in == "fit" and self.rank == 1:
            raise PassedError("in fit")
        hd.safe_barrier()

    def on_testing_end(self):
        self.trainer.queue.put(["tested", self.rank])
        if self.fails_in == "test" and self.rank == 1:
            raise PassedError("in test")
        hd.safe_barrier()


def made(**options):
    trainer = kit.trainer(nprocs=2, **options)
    trainer.plugins.append(Passing())
    return trainer, RankNet()


def drained(trainer):
    items = []
    while not trainer.queue.empty():
        items.append(trainer.queue.get())
    return sorted(items, key=str)


def raised(call, *arguments):
    try:
        call(*arguments)
    except Exception as error:
        return [type(error).__name__, str(error), "\n".join(getattr(error, "__notes__", []))]


def fit():
    trainer, model = made()
    before = [trainer.rank, trainer.local_rank, trainer.gpu_ids, trainer.queue.qsize()]
    is_finished = trainer.fit(model, NotedData())
    result = {
        "before": before,
        "finished": is_finished,
        "stopped by": trainer.stopped_by,
        "items": drained(trainer),
    }
    result["is untouched"] = not hasattr(model, "net") and not hd.is_dist_active()
    result["prepared"] = (FOLDER / "prepared").read_text().split()
    (FOLDER / "prepared").unlink()
    result["test"] = [trainer.test(model, NotedData()), drained(trainer)]
    result["prepared to test"] = (FOLDER / "prepared").read_text().split()
    return result


def exceptions():
    trainer, model = made()
    model.fails_in = "fit"
    result = {"fit": raised(trainer.fit, model, kit.Data()), "items": len(drained(trainer))}
    model.fails_in = "test"
    result["test"] = raised(trainer.test, model, kit.Data())
    trainer._stop_flag.value = 0
    trainer.request_stop()
    asked = trainer._stop_flag.value
    trainer._stop_flag.value = 15
    request_stop(trainer._stop_flag)
    result["flag"] = [asked, trainer._stop_flag.value]
    return result


class TorchrunNet(kit.Net):
    fails = False

    def on_training_end(self):
        trainer = self.trainer
        noted = torch.tensor([self.rank, trainer.local_rank, hd.get_world_size(), self.is_distributed])
        self.seen = [hd.gather_into_tensor(noted, (2, 4)).tolist(), trainer.queue]
        if self.fails and self.rank == 1:
            raise kit.AbortError("on rank 1")
        hd.safe_barrier()


def torchrun():
    """A rank of torchrun."""
    trainer, model = kit.trainer(dist_timeout_s=100), TorchrunNet()
    result = {"finished": trainer.fit(model, kit.Data()), "seen": model.seen, "active": [hd.is_dist_active()]}
    result["tested"] = trainer.test(model, kit.Data())
    hd.init_dist()  # the user's own is used, and left
    trainer.fit(model, kit.Data())
    result["active"].append(hd.is_dist_active())
    hd.shutdown_dist()
    model.fails = True
    result["failed"] = raised(trainer.fit, model, kit.Data())
    result["active"].append(hd.is_dist_active())
    result["rank"] = trainer.rank
    return result


SCENARIOS = {"fit": fit, "exceptions": exceptions, "torchrun": torchrun}

if __name__ == "__main__":
    torch.set_num_threads(1)
    returned = SCENARIOS[sys.argv[1]]()
    rank = returned.get("rank", "")
    torch.save(returned, f"{sys.argv[3]}{rank}")
