"""Trainers in several processes: spawned by this script, or this script in each process of torchrun.

Arguments: the name of a scenario below, a folder, and a file for what it returns.
"""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import trainer_kit as kit

import helios.trainer.distributed as hd
from helios.trainer import Plugin, _launch
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


class FirstFails(kit.Net):
    """Rank 0 raises, and rank 1 waits for it."""

    def on_training_end(self):
        if self.rank == 0:
            raise PassedError("came first")
        hd.safe_barrier()


class SlowToLetGo(kit.Data):
    """On rank 0 it takes until rank 1 has failed because of that, and longer than the parent waits for the silent."""

    def teardown(self):
        if self.trainer.rank == 1:
            (FOLDER / "bereaved").touch()
            return
        while not (FOLDER / "bereaved").exists():
            time.sleep(0.01)
        time.sleep(2.0)


def first_failure():
    _launch.GRACE_S = 0.5
    trainer, _ = made()
    return {"fit": raised(trainer.fit, FirstFails(), SlowToLetGo())}


class SignalledEarly(Plugin):
    """Each rank gets a signal while it starts."""

    def __init__(self):
        super().__init__("early")

    def __setstate__(self, state):
        vars(self).update(state)
        os.kill(os.getpid(), signal.SIGTERM)


class Hasty(Plugin):
    def __init__(self):
        super().__init__("hasty")

    def configure_trainer(self, trainer):
        trainer.request_stop()


class SignalsLate(Plugin):
    """The parent gets a signal when all is done but the last checkpoint."""

    def __init__(self):
        super().__init__("late")

    def on_training_end(self):
        if self.trainer.rank == 0:
            os.kill(os.getppid(), signal.SIGTERM)
            while self.trainer._stop_request.of_parent.value == 0:
                time.sleep(0.01)


def asked():
    result = {}
    for plugin in (SignalledEarly(), Hasty(), SignalsLate()):
        saving = {"chkpt_root": FOLDER / "checkpoints", "chkpt_frequency": 1}
        trainer = kit.trainer(nprocs=2, run_name=plugin.plug_id, **saving)
        trainer.plugins.append(plugin)
        result[plugin.plug_id] = [trainer.fit(kit.Net(), kit.Data()), trainer.stopped_by]
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


SCENARIOS = {function.__name__: function for function in (fit, exceptions, first_failure, asked, torchrun)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    returned = SCENARIOS[sys.argv[1]]()
    rank = returned.get("rank", "")
    torch.save(returned, f"{sys.argv[3]}{rank}")
