"""Progress bars, as a person or a file gets them: each run is a process of its own, in a pseudo-terminal or not."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
import types
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from helios.trainer import TrainingState
from helios.trainer._bar import NoBar, PlainBar, TerminalBar
from helios.trainer._bars import ProgressBars, describe

pytestmark = pytest.mark.long

PROGRAM = """if True:
    import functools, importlib.util, os, sys
    import tqdm as tqdm_module
    spec = importlib.util.spec_from_file_location("trainer_kit", os.environ["KIT"])
    kit = importlib.util.module_from_spec(spec)
    sys.modules["trainer_kit"] = kit
    spec.loader.exec_module(kit)
    from helios.trainer import _bars, _fit, _test_run
    from helios.trainer.logging import get_root_logger
    # A line for every step: what is in it is the point, not when it comes.
    _fit.ProgressBars = _test_run.ProgressBars = functools.partial(_bars.ProgressBars, plain_interval_s=0)

    class Net(kit.Net):
        @property
        def metrics(self):
            return {"lr": self.schedule.get_last_lr()[0], "text": "not a number"}

        def on_training_batch_end(self, state, should_log=False):
            super().on_training_batch_end(state, should_log)
            if state.global_iteration == 2:
                get_root_logger().info("trained on two")

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


class Screen:
    """A terminal that never scrolls: what stands in it, and what stood in it each time the cursor went back.

    Args:
        sent: all that the terminal was sent.
    """

    def __init__(self, sent):
        self.rows, self.frames = [""], []
        row = column = 0
        for control, text in re.findall(r"(\x1b\[A|\r|\n)|([^\r\n\x1b]+)", sent):
            if text:
                before = self.rows[row].ljust(column)
                self.rows[row] = before[:column] + text + before[column + len(text) :]
                column += len(text)
            elif control == "\r":
                self.frames.append([line.rstrip() for line in self.rows])
                column = 0
            else:
                row += 1 if control == "\n" else -1
                assert row >= 0
                self.rows += [""] * (row + 1 - len(self.rows))

    def lines(self):
        """What is left in the end."""
        return [row.rstrip() for row in self.rows if row.strip()]


def surroundings(**more):
    kit = str(Path(__file__).with_name("trainer_kit.py"))
    return {**os.environ, "KIT": kit, "TERM": "xterm", "TQDM_MININTERVAL": "0", **more}


@pytest.fixture
def terminal(tmp_path):
    """Run a program in a terminal; return all that the terminal was sent."""

    def run(code, columns=100, rows=30):
        main, sub = pty.openpty()
        fcntl.ioctl(sub, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM + "\n    " + code],
            cwd=tmp_path,
            env=surroundings(),
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
        return sent.decode()

    return run


def positions(text, name):
    """The (done, total) that the bar of this name showed, each once, in order."""
    found = re.findall(rf"{re.escape(name)}:[^\r\n]*?(\d+)/(\d+) \[", text)
    return list(dict.fromkeys((int(a), int(b)) for a, b in found))


def file_log(tmp_path):
    return "".join(path.read_text() for path in (tmp_path / "logs").iterdir())


BAR = r"(epochs|epoch \d+|iterations|validation|test): +\d+%\|.*\| \d+/\d+ \[\d\d:\d\d<.*/s.*\]"
LOG = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] [A-Z]+: [^|]*"


def bars_of(frame):
    return [match[1] for line in frame if (match := re.fullmatch(BAR, line))]


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
    assert not re.search(r"epochs:|epoch 1:|validation:|test:|/s,|\r|\x1b", log)

    screen = Screen(text)
    seen = {tuple(bars_of(frame)) for frame in screen.frames}
    whole = {("epochs",), ("epochs", "epoch 1"), ("epochs", "epoch 2"), ("epochs", "epoch 2", "validation")}
    whole |= {(), ("epochs", "test")}
    while_cleared = {names[1:] for names in whole}  # for a moment, to print a line
    assert whole <= seen <= whole | while_cleared
    for line in {line for frame in screen.frames for line in frame}:
        assert re.fullmatch(f"{BAR}|{LOG}|END|", line), line  # nothing is printed through anything
    # What stays: the log and the bar of epochs, with the last loss.
    *said, summary, end = screen.lines()
    assert end == "END" and "finished" in summary
    assert [line.split(": ", 1)[1] for line in said[:2]] == ["trained on two", "validated 1"]
    assert re.fullmatch(r"epochs: 100%\|.*2/2 \[.*loss=.*\]", said[2]) and len(said) == 3


def test_control_the_screen_sees_what_is_printed_through_bars(terminal):
    code = "kit.Net.on_training_epoch_end = lambda self, epoch: print('through')\n    fit(kit.EPOCH, 1)"
    lines = {line for frame in Screen(terminal(code)).frames for line in frame}
    assert not all(re.fullmatch(f"{BAR}|{LOG}|END|", line) for line in lines)


def test_iterations(terminal, tmp_path):
    text = terminal("fit(kit.ITERATION, 3, accumulation_steps=2)")
    assert positions(text, "iterations") == [(i, 3) for i in range(4)]  # complete ones
    assert positions(text, "validation") == [(i, 3) for i in range(4)]
    assert "epoch 1:" not in text
    assert not re.search(r"iterations:|validation:|/s,", file_log(tmp_path))
    screen = Screen(text)
    assert {tuple(bars_of(f)) for f in screen.frames} == {(), ("iterations",), ("iterations", "validation")}
    lines = screen.lines()
    assert re.fullmatch(r"iterations: 100%\|.*3/3 \[.*it/s, loss=.*\]", lines[2])
    assert "finished" in lines[3] and lines[4:] == ["END"]


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
    by_iteration = "chkpt_root='a', chkpt_frequency=2"
    by_epoch = "chkpt_root='b', chkpt_frequency=1, valid_frequency=None"
    text = terminal(
        f"fit(kit.ITERATION, 8, abort_at=50, {by_iteration}); fit(kit.ITERATION, 8, {by_iteration})\n"
        f"    fit(kit.EPOCH, 3, abort_at=45, {by_epoch}); fit(kit.EPOCH, 3, {by_epoch})\n"
        f"    fit(kit.EPOCH, 4, {by_epoch}); assert not tqdm_module.tqdm._instances"
    )
    first, second, _, epochs, more, _ = text.split("END")
    assert positions(first, "iterations")[0] == (0, 8)
    assert positions(second, "iterations") == [(i, 8) for i in range(4, 9)]
    assert positions(epochs, "epochs") == [(i, 3) for i in range(1, 4)]
    assert positions(epochs, "epoch 2") == []  # ended before: only its end is left to do
    assert positions(epochs, "epoch 3") == [(i, 4) for i in range(5)]
    assert positions(more, "epochs") == [(3, 4), (4, 4)]  # of a run that was given more to do
    assert positions(more, "epoch 3") == []
    assert positions(more, "epoch 4") == [(i, 4) for i in range(5)]


def test_below_the_bar_of_the_script_itself(terminal):
    options = "abort_at=12, valid_frequency=None"
    text = terminal(f"for f in tqdm_module.tqdm(range(2), desc='folds'): fit(kit.EPOCH, 1, {options})")
    screen = Screen(text)
    names = {tuple(re.findall(r"(?m)^(folds|epochs|epoch 1):", "\n".join(frame))) for frame in screen.frames}
    assert ("folds", "epochs", "epoch 1") in names
    assert "epoch 1:" not in "\n".join(screen.lines())  # though the run was interrupted


# Not a terminal.


@pytest.fixture
def files(tmp_path):
    """Run a program whose stdout and stderr are files; return what is in them."""

    def run(code, **options):
        with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
            command = [sys.executable, "-W", "error", "-c", PROGRAM + "\n    " + code]
            options = {"stdout": out, "stderr": err, **options}
            done = subprocess.run(command, cwd=tmp_path, env=surroundings(), timeout=60, **options)
        assert done.returncode == 0, (tmp_path / "err").read_text()
        return (tmp_path / "out").read_bytes().decode(), (tmp_path / "err").read_bytes().decode()

    return run


def test_lines_of_epochs(files, tmp_path):
    out, err = files("fit(kit.EPOCH, 2, test=True)")
    assert not re.search(r"[^\n -~]", err)  # no control characters, and ASCII alone
    assert err.endswith("\n")
    assert all(re.fullmatch(BAR, line) for line in err.splitlines())
    assert positions(err, "epochs") == [(1, 2), (2, 2)]
    assert positions(err, "epoch 2") == [(i, 4) for i in range(1, 5)]
    assert positions(err, "validation") == [(i, 3) for i in range(1, 4)]
    assert positions(err, "test") == [(i, 5) for i in range(1, 6)]
    assert len(err.splitlines()) == 2 + 2 * 4 + 3 + 5  # each once
    assert re.search(r"(?m)^epochs: .*loss=[0-9.e-]+, lr=[0-9.]+\]$", err)
    assert all(re.fullmatch(f"{LOG}|END", line) for line in out.splitlines())
    assert "epochs:" not in file_log(tmp_path)


def test_lines_start_at_the_restored_position(files):
    options = "chkpt_root='c', chkpt_frequency=2"
    _, err = files(f"fit(kit.ITERATION, 8, abort_at=50, {options}); fit(kit.ITERATION, 8, {options})")
    assert positions(err, "iterations") == [(i, 8) for i in range(1, 9)]
    shown = [int(done) for done in re.findall(r"iterations: .* (\d)/8", err)]
    assert shown[-4:] == [5, 6, 7, 8]


def test_one_file_gets_log_and_lines_in_order(files):
    out, _ = files("fit(kit.ITERATION, 4)", stderr=subprocess.STDOUT)
    kinds = [re.split(": ", re.sub(r"^\[.*\] INFO", "log", line))[0] for line in out.splitlines()]
    validation = ["validation"] * 3
    first, second = ["iterations", "log", "iterations"], ["log", "iterations", "iterations"]
    assert kinds == [*first, *validation, *second, *validation, "log", "log", "END"]


def test_nobody_listens(files):
    code = "import os; read, write = os.pipe(); os.close(read); os.dup2(write, 2); fit(kit.EPOCH, 2)\n"
    out, err = files(code + "    sys.stderr = None; fit(kit.EPOCH, 2)")
    assert out.count("finished: total_steps reached") == 2 and err == ""


@pytest.fixture
def clocked():
    """Make a plain bar whose clock the test sets; return bar, stream, and the clock."""

    def make(total=10, done=0):
        now = types.SimpleNamespace(s=0.0)
        stream = io.StringIO()
        bar = PlainBar(stream, "bar", unit="it", total=total, done=done, interval_s=30.0, clock=lambda: now.s)
        return bar, stream, now

    return make


def said(stream):
    return [(int(n), elapsed) for n, elapsed in re.findall(r"(\d+)(?:/\d+|it) \[([\d:]+)", stream.getvalue())]


def test_a_line_every_interval_and_one_at_the_end(clocked):
    bar, stream, now = clocked()
    for _ in range(9):
        now.s += 13
        bar.update()
    assert said(stream) == [(3, "00:39"), (6, "01:18"), (9, "01:57")]
    bar.update()
    bar.show("loss=1")
    bar.close()
    assert said(stream)[3:] == [(10, "01:57")]
    assert stream.getvalue().splitlines()[-1].endswith("loss=1]")


def test_a_short_bar_says_nothing(clocked):
    bar, stream, now = clocked(total=None, done=5)
    now.s = 29.9
    bar.update()
    bar.close()
    assert stream.getvalue() == ""
    now.s = 30
    bar.update()
    assert said(stream) == [(7, "00:30")]
    bar.close()
    assert said(stream) == [(7, "00:30")]  # it says where it ended once


def test_nothing_is_formatted_between_lines(clocked, monkeypatch):
    """So a step costs a look at the clock."""
    bar, _, now = clocked()
    monkeypatch.setattr(bar, "draw", lambda: pytest.fail("drawn"))
    assert [bar.count() for _ in range(1000)] == [False] * 1000
    now.s = 31
    assert bar.count()


# What ProgressBars is told.


@pytest.fixture
def lines(kit, monkeypatch):
    """Make bars that write a line for every step, and the stream that they write to."""

    def make(unit, total_steps, **options):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        return ProgressBars(True, unit, total_steps, **{"plain_interval_s": 0.0, **options}), stream

    return make


def test_loaders_without_a_length(kit, lines):
    model = kit.Net()
    bars, stream = lines(kit.EPOCH, 2)
    bars.start(TrainingState(), 0)
    bars.start_epoch(TrainingState(global_epoch=1, dataset_iter=3), None)
    bars.finish_batch(True, model)
    with bars.evaluation("validation", None) as bar:
        bar.update(1)
    bars.finish_epoch()
    bars.close()
    shown = [line.split(" [")[0] for line in stream.getvalue().splitlines()]
    assert shown == ["epoch 1: 4batch", "validation: 1batch", "epochs:  50%|#####     | 1/2"]


@pytest.mark.parametrize("is_infinite", [True, False])
def test_a_run_without_an_end(kit, lines, is_infinite):
    bars, stream = lines(kit.ITERATION, float("inf") if is_infinite else 20)
    bars.start(TrainingState(current_iteration=7, global_iteration=14), 0)
    bars.finish_batch(False, kit.Net())
    bars.finish_batch(True, kit.Net())
    bars.finish_epoch()
    bars.close()
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("iterations: 8it [" if is_infinite else "iterations:  40%|####      | 8/20 [")


def test_the_kind_of_bar(kit, monkeypatch):
    main, sub = pty.openpty()
    with os.fdopen(sub, "w") as stream, os.fdopen(main):
        monkeypatch.setattr(sys, "stderr", stream)
        for term, kind in (("xterm", TerminalBar), ("dumb", PlainBar)):
            monkeypatch.setenv("TERM", term)
            with ProgressBars(True, kit.EPOCH, 1).evaluation("test", 2) as bar:
                assert type(bar) is kind
        with ProgressBars(False, kit.EPOCH, 1).evaluation("test", 2) as bar:
            assert type(bar) is NoBar
    assert type(ProgressBars(True, kit.EPOCH, 1).evaluation("test", 2)) is NoBar  # stderr is closed


def test_a_terminal_without_a_size(kit, monkeypatch):
    """tqdm alone would draw nothing."""
    main, sub = pty.openpty()
    fcntl.ioctl(sub, termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
    with os.fdopen(sub, "w") as stream, os.fdopen(main, "rb", buffering=0) as other:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        bars = ProgressBars(True, kit.EPOCH, 3)
        bars.start(TrainingState(), 1)
        bars.close()
        stream.flush()
        assert positions(other.read(4096).decode(), "epochs") == [(1, 3)]


# What stands beside the count.


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (3, "3"),
        (1234567, "1234567"),
        (True, "1"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (Fraction(1, 4), "0.25"),
        (np.float32(0.5), "0.5"),
        (np.float64(0.5), "0.5"),
        (np.int64(7), "7"),
        (np.array([0.25]), "0.25"),
        (torch.tensor(0.5, requires_grad=True) * 1, "0.5"),
        (torch.tensor([[0.5]], dtype=torch.bfloat16), "0.5"),
        (torch.tensor(12345), "12345"),
        (torch.nn.Parameter(torch.zeros(())), "0"),
    ],
)
def test_numbers(kit, value, text):
    model = kit.Net()
    model.metrics = {"x": value}
    assert describe(model) == f"x={text}"


@pytest.mark.parametrize(
    "value",
    [
        None, "text", [1.0], {"a": 1.0}, 1j, torch.tensor(1j), torch.ones(2), np.ones(2), torch.nn.Linear(1, 1),
        torch.ones(1).to_sparse(), torch.empty((), device="meta"),
    ],
)  # fmt: skip
def test_what_is_no_number_is_skipped(kit, value):
    model = kit.Net()
    model.metrics = {"a": 1.0, "x": value, "b": 2.0}
    assert describe(model) == "a=1, b=2"


def test_nothing_is_read_from_a_device(kit):
    """Not even asked for its value: to copy it to the CPU is the business of those who want to wait."""

    class Elsewhere(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, kinds, args=(), kwargs=None):
            raise AssertionError(f"{function} was called")

    model = kit.Net()
    model._loss_items["loss"] = torch.ones(()).as_subclass(Elsewhere)
    with pytest.raises(AssertionError, match="was called"):  # control
        model._loss_items["loss"].item()
    assert describe(model) == ""


def test_names(kit):
    model = kit.Net()
    model._loss_items["loss"] = 1.0
    model._val_scores |= {"loss": 2.0, "accuracy": 0.5}
    assert describe(model) == "loss=1, valid loss=2, accuracy=0.5"
    model.metrics = {"loss": 3.0, "a{b}%s": 1, "tab\tline\nred\x1b[31m": 2, "ä" * 300: 4, 7: 5}
    assert describe(model) == "loss=3, a{b}%s=1, tab?line?red?[31m=2, " + "ä" * 300 + "=4, 7=5"


def test_the_bar_of_epochs_keeps_what_the_last_epoch_had(kit, lines):
    bars, stream = lines(kit.EPOCH, 2)
    bars.start(TrainingState(), 0)
    bars.start_epoch(TrainingState(global_epoch=1), 2)
    model = kit.Net()
    for loss in (0.5, 0.25):
        model._loss_items["loss"] = loss
        bars.finish_batch(True, model)
    model._val_scores["score"] = 9
    bars.finish_epoch()
    bars.close()
    assert [line.split("/s, ")[-1] for line in stream.getvalue().splitlines()] == [
        "loss=0.5]", "loss=0.25]", "loss=0.25, score=9]",
    ]  # fmt: skip
