"""A checkpoint that cannot be written: training goes on, the last good file stays, and the last one raises."""

import errno

import pytest

from helios.chkpt import find_last_checkpoint, load, verify

pytestmark = pytest.mark.long

SCRIPT = """
import resource, signal, sys, threading
import torch, helios.trainer as hlt
from helios.data import DataModule
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails with EFBIG, as a full disk's does with ENOSPC
first, last, is_async = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "async"
class M(hlt.Model):
    def setup(self, fast_init=False): self.weight = torch.zeros(100_000)
    def state_dict(self): return {"weight": self.weight}
    def load_state_dict(self, state, fast_init=False): self.weight = state["weight"]
    def train_step(self, batch, state):
        self.weight += torch.rand(100_000)
        full = first <= state.global_iteration <= last
        for thread in threading.enumerate():  # a save in the background belongs to the disk as it was
            if thread is not threading.current_thread(): thread.join()
        limit = 50_000 if full else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
class D(DataModule):
    def setup(self): self._train_dataset = self._create_dataset(list(range(12)), {})
trainer = hlt.Trainer("r", hlt.TrainingUnit.ITERATION, 12, use_cpu=True, chkpt_frequency=2, chkpt_root="c",
    enable_file_logging=True, log_path="l", async_chkpt=is_async, print_banner=False, keep_last=2)
model = M("m")
print("fit", trainer.fit(model, D()), model.weight.sum().item().hex())
"""


@pytest.fixture
def run(scripts):
    def run_in(folder, first, last, is_async):
        folder.mkdir(exist_ok=True)
        return scripts(SCRIPT, first, last, "async" if is_async else "sync", folder=folder)

    return run_in


@pytest.mark.parametrize("is_async", [True, False])
def test_a_disk_that_is_full_for_a_while(run, tmp_path, is_async):
    whole = run(tmp_path / "whole", 0, 0, is_async)
    done = run(tmp_path / "full", 5, 8, is_async)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]
    (log,) = (tmp_path / "full" / "l").iterdir()
    lost = [line for line in log.read_text().splitlines() if "could not be written" in line]
    assert len(lost) == 2
    assert all("ERROR" in line and f"[Errno {errno.EFBIG}]" in line for line in lost)
    assert sorted(p.name for p in (tmp_path / "full" / "c").iterdir()) == [
        "r_epoch_1_iter_10.pth",
        "r_epoch_1_iter_12.pth",
    ]


@pytest.mark.parametrize("is_async", [True, False])
def test_a_disk_that_is_full_to_the_end(run, tmp_path, is_async):
    whole = run(tmp_path / "whole", 0, 0, is_async)
    done = run(tmp_path / "full", 5, 12, is_async)
    assert done.returncode == 1
    assert "RuntimeError: training failed: OSError: [Errno 27]" in done.stderr
    last = find_last_checkpoint(tmp_path / "full" / "c", "r")
    verify(last)
    assert load(last)["training_state"]["global_iteration"] == 4  # the last good one
    assert not [p for p in (tmp_path / "full" / "c").iterdir() if p.suffix != ".pth"]
    again = run(tmp_path / "full", 0, 0, is_async)  # somebody made room
    assert again.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]


def test_a_state_that_cannot_be_stored_ends_the_run(kit, tmp_path):
    class Bad(kit.Net):
        def state_dict(self):
            return {"root": tmp_path}

    with pytest.raises(RuntimeError, match=r"training failed: TypeError: .*root"):
        kit.trainer(total_steps=2, chkpt_root=tmp_path, chkpt_frequency=1).fit(Bad(), kit.Data())
