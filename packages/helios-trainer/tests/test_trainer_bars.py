"""Progress bars, as a terminal gets them: each test runs a process of its own in a pseudo-terminal."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

PROGRAM = """if True:
    import importlib.util, os, sys
    import tqdm as tqdm_module
    spec = importlib.util.spec_from_file_location("trainer_kit", os.environ["KIT"])
    kit = importlib.util.module_from_spec(spec)
    sys.modules["trainer_kit"] = kit
    spec.loader.exec_module(kit)
    import helios.trainer._bars as bars
    from helios.trainer.logging import get_root_logger

    class Always(tqdm_module.tqdm):  # draws every step, however fast: what is drawn is the point, not when
        def __init__(self, *args, **options):
            super().__init__(*args, mininterval=0, miniters=1, **options)

    bars.tqdm = Always

    class Net(kit.Net):
        @property
        def metrics(self):
            return {"lr": self.schedule.get_last_lr()[0], "text": "not a number"}

        def on_validation_end(self, validation_cycle):
            super().on_validation_end(validation_cycle)
            get_root_logger().info("validated %d", validation_cycle)

    def fit(unit, total_steps, abort_at=None, test=False, **options):
        trainer = kit.trainer(unit, total_steps, run_name="r", enable_file_logging=True, log_path="logs",
                              **{"enable_progress_bar": True, "valid_frequency": 2, **options})
        model = Net(abort_at=abort_at)
        try:
            trainer.fit(model, kit.Data(train=4, valid=3))
            if test:
                trainer.test(model, kit.Data(test=5))
        except kit.AbortError:
            pass
        print("END", flush=True)
        return model
"""


@pytest.fixture
def terminal(tmp_path):
    """Run a program in a terminal of 100 columns; return all that the terminal was sent, control codes gone."""

    def run(code):
        main, sub = pty.openpty()
        fcntl.ioctl(sub, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        kit = str(Path(__file__).with_name("trainer_kit.py"))
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM + "\n    " + code],
            cwd=tmp_path,
            env={**os.environ, "KIT": kit, "COLUMNS": "100", "TERM": "xterm"},
            stdin=sub,
            stdout=sub,
            stderr=sub,
        )
        os.close(sub)
        sent, deadline_s = b"", time.monotonic() + 60
        while time.monotonic() < deadline_s:
            if not select.select([main], [], [], 1)[0]:
                continue
            try:
                piece = os.read(main, 65536)
            except OSError:  # the other side is closed
                break
            if not piece:
                break
            sent += piece
        os.close(main)
        assert process.wait(timeout=30) == 0, sent.decode()
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", sent.decode())

    return run


def positions(text, name):
    """The (done, total) that the bar of this name showed, each once, in order."""
    found = re.findall(rf"{re.escape(name)}:[^\r\n]*?(\d+)/(\d+) \[", text)
    return list(dict.fromkeys((int(a), int(b)) for a, b in found))


def file_log(tmp_path):
    return "".join(path.read_text() for path in (tmp_path / "logs").iterdir())


def test_epochs(terminal, tmp_path):
    text = terminal("fit(kit.EPOCH, 2, test=True)")
    assert positions(text, "epochs") == [(0, 2), (1, 2), (2, 2)]
    for epoch in (1, 2):
        assert positions(text, f"epoch {epoch}") == [(i, 4) for i in range(5)]
    assert positions(text, "validation") == [(i, 3) for i in range(4)]
    assert positions(text, "test") == [(i, 5) for i in range(6)]
    assert re.search(r"epoch 1:.*loss=[0-9.e-]+, lr=0\.05\]", text)
    assert "not a number" not in text
    log = file_log(tmp_path)
    assert "validated 1" in log and "validated 1" in text
    assert not re.search(r"epochs:|epoch 1:|validation:|test:|it/s|\r", log)


def test_iterations(terminal, tmp_path):
    text = terminal("fit(kit.ITERATION, 3, accumulation_steps=2)")
    assert positions(text, "iterations") == [(i, 3) for i in range(4)]  # complete ones
    assert positions(text, "validation") == [(i, 3) for i in range(4)]
    assert "epoch 1:" not in text
    assert not re.search(r"iterations:|validation:|it/s", file_log(tmp_path))


def test_control_without_bars_and_an_infinite_one(terminal):
    text = terminal(
        "for unit in (kit.EPOCH, kit.ITERATION): fit(unit, 2, enable_progress_bar=False)\n"
        "    fit(kit.ITERATION, float('inf'), early_stop_cycles=1, abort_at=30)"
    )
    by_epoch, by_iteration, infinite, _ = text.split("END")
    for without in (by_epoch, by_iteration):
        assert not re.search(r"epochs:|epoch 1:|iterations:|validation:", without)
        assert "validated 1" in without
    assert re.search(r"iterations: \d+it \[", infinite)


def test_they_start_at_the_restored_position(terminal):
    options = "chkpt_root='c', chkpt_frequency=2"
    text = terminal(f"fit(kit.ITERATION, 8, abort_at=50, {options}); fit(kit.ITERATION, 8, {options})")
    first, second, _ = text.split("END")
    assert positions(first, "iterations")[0] == (0, 8)
    assert positions(second, "iterations") == [(i, 8) for i in range(4, 9)]


def test_epochs_start_at_the_restored_position(terminal):
    options = "chkpt_root='c', chkpt_frequency=1, valid_frequency=None"
    text = terminal(f"fit(kit.EPOCH, 4, abort_at=45, {options}); fit(kit.EPOCH, 4, {options})")
    _, second, _ = text.split("END")
    assert positions(second, "epochs") == [(i, 4) for i in range(1, 5)]
    assert positions(second, "epoch 2")[0][0] == 0  # ended before: only its end is left to do
    assert positions(second, "epoch 3") == [(i, 4) for i in range(5)]


def test_more_steps_leave_no_stale_bar(terminal):
    options = "chkpt_root='c', chkpt_frequency=1, valid_frequency=None"
    text = terminal(
        f"fit(kit.EPOCH, 1, {options}); fit(kit.EPOCH, 2, {options}); assert not tqdm_module.tqdm._instances"
    )
    _, second, _ = text.split("END")
    assert positions(second, "epochs") == [(1, 2), (2, 2)]
    assert positions(second, "epoch 1") == []
    assert positions(second, "epoch 2") == [(i, 4) for i in range(5)]
