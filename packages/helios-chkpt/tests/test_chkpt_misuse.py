"""What people do to a store in anger: Ctrl-C, threads, links, folders that nobody may read, unset variables."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from helios import chkpt
from helios.chkpt import CheckpointStore
from helios.chkpt._format.values import Call, Global
from helios.chkpt._write import write_archive
from helios.chkpt_migrator._command import helios_chkpt

_INTERRUPTED = """
import signal, sys, torch
from helios.chkpt import CheckpointStore
store = CheckpointStore(sys.argv[1], "run")
state = {"x": torch.ones(16 << 20)}
store.save_async(state, epoch=1, iteration=1)
signal.signal(signal.SIGALRM, signal.default_int_handler)
try:
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    store.wait()
    print("too fast")
except KeyboardInterrupt:
    if sys.argv[2] == "go on":
        state["x"].fill_(2)
        store.save_async(state, epoch=1, iteration=2)
        store.close()
"""


@pytest.mark.parametrize("what", ["exit", "go on"])
def test_ctrl_c_while_a_save_is_waited_for_loses_nothing(tmp_path: Path, what: str) -> None:
    subprocess.run([sys.executable, "-c", _INTERRUPTED, tmp_path, what], check=True, timeout=100)
    files = sorted(tmp_path.glob("*.pth"))
    assert len(files) == (1 if what == "exit" else 2)
    for number, file in enumerate(files, 1):
        content = chkpt.load(file)["x"]
        assert isinstance(content, torch.Tensor)
        assert (content == number).all()
    assert not list(tmp_path.glob(".*"))


def test_ctrl_c_while_a_save_begins_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        start(self)
        raise KeyboardInterrupt

    state = {"x": torch.ones(8 << 20)}
    with CheckpointStore(tmp_path, "run") as store:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.save_async(state, epoch=1, iteration=1)
        state["x"].fill_(2)
        second = store.save_async(state, epoch=1, iteration=2)
    for path in tmp_path.glob("*.pth"):  # the first may be there, or not: its caller knows nothing of it
        content = chkpt.load(path)["x"]
        assert isinstance(content, torch.Tensor)
        assert (content == (2 if path == second else 1)).all()
    assert second.exists()


def test_a_forked_process_does_not_wait_for_a_thread_that_it_has_not(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, "run")
    store.save_async({"x": torch.ones(8 << 20)}, epoch=1, iteration=1)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        store.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    store.close()


def test_a_save_of_what_another_thread_changes_can_be_read(tmp_path: Path) -> None:
    x, is_over = torch.zeros(4 << 20), threading.Event()

    def change() -> None:
        while not is_over.is_set():
            x.add_(1)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(5):
            chkpt.verify(chkpt.save({"x": x}, tmp_path / "a.pth"))
    finally:
        is_over.set()
        thread.join()


def test_prune_keeps_what_a_kept_link_leads_to(tmp_path: Path) -> None:
    chkpt.save({"x": 1}, tmp_path / "run_epoch_1_iter_1.pth")
    (tmp_path / "run_epoch_2_iter_2.pth").symlink_to("run_epoch_1_iter_1.pth")
    assert helios_chkpt(["prune", str(tmp_path), "--run", "run", "--keep-last", "1"]) == 0
    assert chkpt.find_last_checkpoint(tmp_path) is not None


@pytest.mark.parametrize(
    "command", [["ls"], ["verify"], ["migrate"], ["prune", "--run", "r", "--keep-last", "1"]]
)
def test_an_empty_argument_is_not_the_folder_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert helios_chkpt([*command, ""]) == 2


@pytest.mark.parametrize("layout", ["torch._inductor", "torch.load", "os", "torch.float32"])
def test_a_layout_that_is_none_is_not_looked_up_in_torch(tmp_path: Path, layout: str) -> None:
    call = Call(Global("torch.serialization", "_get_layout"), (layout,))
    write_archive({"x": call}, [], tmp_path / "a.pth")
    for read in (chkpt.load, chkpt.verify):
        with pytest.raises(chkpt.CorruptError, match="layout"):
            read(tmp_path / "a.pth")


def test_pruning_many_files_takes_no_quadratic_time(tmp_path: Path) -> None:
    one = chkpt.save({"x": 1}, tmp_path / "run_epoch_1_iter_0.pth")
    for number in range(1, 4000):
        (tmp_path / f"run_epoch_1_iter_{number}.pth").write_bytes(one.read_bytes())
    began = time.perf_counter()
    with CheckpointStore(tmp_path, "run", keep_last=1) as store:
        assert len(store.prune()) == 3999
    assert time.perf_counter() - began < 5


def test_without_what_only_linux_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("posix_fadvise", "POSIX_FADV_DONTNEED", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    path = chkpt.save({"x": torch.ones(4 << 20)}, tmp_path / "a.pth")
    chkpt.verify(path)
    assert "x" in chkpt.load(path)
