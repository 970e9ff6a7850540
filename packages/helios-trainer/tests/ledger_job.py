"""Runs with a ledger in processes that are really killed. Arguments: a folder, and chains of processes as JSON.

A chain is a run: `kills` has one [place, step] for each process that is to die, and the last process is to end. Every
process is a fork of this one, which has imported everything and started nothing, so that each takes milliseconds.
Writes how each process ended to ends.json, and after each a copy of the ledger to after-<number>.jsonl.
"""

import importlib.util
import json
import os
import resource
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch._dynamo

from helios.trainer.ledger import Ledger

assert torch._dynamo  # the first optimizer imports it, which takes seconds

spec = importlib.util.spec_from_file_location("trainer_kit", Path(__file__).parent / "trainer_kit.py")
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)


class Death:
    """Kills this process at a place, when a step has been reached."""

    def __init__(self, place, step):
        self.place, self.step, self.now = place, step, 0

    def at(self, place):
        if place == self.place and self.now >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class MortalNet(kit.Net):
    death = Death(None, 0)

    def on_training_start(self):
        self.death.at("opened")

    def train_step(self, batch, state):
        self.death.now = state.global_iteration
        self.death.at("in train_step")
        super().train_step(batch, state)

    def should_training_stop(self):
        self.death.at("after the row")
        return False

    def append_metadata_to_chkpt_name(self, chkpt_name):
        self.death.at("before the mark")
        return chkpt_name

    def on_training_epoch_end(self, epoch):
        self.death.at("after the checkpoint")
        super().on_training_epoch_end(epoch)

    def on_training_end(self):
        self.death.at("after the end")


class LimitedNet(kit.Net):
    """No file can grow beyond 1200 bytes before step 6: a full disk, as the kernel makes one."""

    def train_step(self, batch, state):
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if state.global_iteration == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1200, hard))
        elif state.global_iteration == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        super().train_step(batch, state)


class MortalLedger(Ledger):
    death = Death(None, 0)

    def state_dict(self):
        state = super().state_dict()
        self.death.at("after the mark")
        return state


def torn_writes(death):
    """Let the row of the step be written by half, and kill."""
    write = os.write

    def tear(descriptor, content):
        is_row = content.startswith(b'{"step"') and death.place == "in the row"
        if is_row and json.loads(content)["step"] >= death.step:
            write(descriptor, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, content)

    os.write = tear


def fit(folder, chain, kill):
    """One process of a chain."""
    warnings.simplefilter("error")
    if chain.get("uncut"):  # for a control
        os.ftruncate = lambda descriptor, length: None
    death = Death(*kill)
    torn_writes(death)
    model = LimitedNet() if chain.get("limited") else MortalNet()
    ledger = MortalLedger(folder / "ledger.jsonl", chain.get("weights_every", 2))
    model.death = ledger.death = death
    root = None if chain.get("limited") else folder / "chkpt"
    trainer = kit.trainer(kit.TrainingUnit[chain["unit"]], chkpt_root=root, **chain["options"])
    trainer.plugins.append(ledger)
    trainer.fit(model, kit.Data(**chain["data"]))


def in_a_fork(*arguments):
    """Return how a process that fits ended: its exit status, or minus the signal."""
    process_id = os.fork()
    if process_id == 0:
        status = 1
        try:
            fit(*arguments)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])


def main():
    torch.set_num_threads(1)
    os.dup2(2, 1)  # what runs log is not what is printed
    root, chains = Path(sys.argv[1]), json.loads(sys.argv[2])
    ends = {}
    for name, chain in chains.items():
        folder = root / name
        folder.mkdir()
        ends[name] = []
        for number, kill in enumerate([*chain["kills"], [None, 0]]):
            ends[name].append(in_a_fork(folder, chain, kill))
            (folder / f"after-{number}.jsonl").write_bytes((folder / "ledger.jsonl").read_bytes())
    (root / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main()
