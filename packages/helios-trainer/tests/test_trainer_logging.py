"""Log files and TensorBoard: names, content, going on after an interruption, and leaving no trace behind."""

import contextlib
import io
import logging
import re
import sys
import warnings
from datetime import datetime

import pytest

from helios.chkpt import find_last_checkpoint, load
from helios.trainer.logging import get_root_logger, get_tensorboard_writer


def accumulated(folder):
    """All scalars below a folder, read by TensorBoard itself: {(sub-folder, tag): [(step, value), ...]}."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    scalars = {}
    for path in sorted({p.parent for p in folder.rglob("events.out.tfevents.*")}):
        reader = EventAccumulator(str(path), purge_orphaned_data=False)
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            values = [(event.step, event.value) for event in reader.Scalars(tag)]
            scalars[str(path.relative_to(folder)), tag] = values
    return scalars


@pytest.fixture
def logged(kit, tmp_path):
    """Fit a model that logs much; return it."""

    class Logging(kit.Net):
        def on_training_batch_end(self, state, should_log=False):
            super().on_training_batch_end(state, should_log)
            get_root_logger().info("iteration %d", state.global_iteration)
            writer = get_tensorboard_writer()
            if writer is not None:
                writer.add_scalar("loss", self._loss_items["loss"].item(), state.global_iteration)

        def on_validation_end(self, validation_cycle):
            super().on_validation_end(validation_cycle)
            writer = get_tensorboard_writer()
            if writer is not None:
                scores = {"a": self._val_scores["sum"].item(), "b": 2.0}
                writer.add_scalars("scores", scores, validation_cycle)

        def on_training_epoch_end(self, epoch):
            super().on_training_epoch_end(epoch)
            writer = get_tensorboard_writer()
            if writer is not None:
                writer.add_scalar("epoch", epoch, epoch)  # a step unit of the user's own

    def fit(root, abort_at=None, unit=kit.EPOCH, model=Logging, **options):
        options = {
            "total_steps": 3, "valid_frequency": 1, "chkpt_frequency": 1, "chkpt_root": root / "chkpt",
            "enable_file_logging": True, "log_path": root / "deep" / "logs",
            "enable_tensorboard": True, "run_path": root / "deep" / "runs", **options,
        }  # fmt: skip
        made = model(abort_at=abort_at)
        trainer = kit.trainer(unit, **options)
        with contextlib.suppress(kit.AbortError):
            trainer.fit(made, kit.Data())
        return made

    return fit


def test_names(logged, tmp_path):
    logged(tmp_path, run_name="cifar10")
    (log,) = (tmp_path / "deep" / "logs").iterdir()
    (folder,) = (tmp_path / "deep" / "runs").iterdir()
    for name, suffix in ((log.name, ".log"), (folder.name, "")):
        match = re.fullmatch(r"cifar10_(\w{3}\d\d_\d\d-\d\d-\d\d)" + re.escape(suffix), name)
        assert datetime.strptime(match[1], "%b%d_%H-%M-%S")
    checkpoint = load(find_last_checkpoint(tmp_path / "chkpt"))
    assert (checkpoint["log_path"], checkpoint["run_path"]) == (str(log), str(folder))


def test_without_a_run_name_the_save_name_is_used(logged, tmp_path):
    logged(tmp_path)
    assert next((tmp_path / "deep" / "logs").iterdir()).name.startswith("net_")


def test_two_runs_of_one_name_never_share_files(logged, tmp_path):
    for root in ("one", "two", "three"):
        # Without checkpoints there is nothing to go on from, and they begin in the same second.
        logged(tmp_path, run_name="r", chkpt_root=tmp_path / root, total_steps=1)
    assert len(list((tmp_path / "deep" / "logs").iterdir())) == 3
    assert len(list((tmp_path / "deep" / "runs").iterdir())) == 3


@pytest.mark.parametrize("unit", ["EPOCH", "ITERATION"])
@pytest.mark.parametrize("at", [0.35, 0.5, 0.65, 0.9])
def test_an_interrupted_run_goes_on_in_the_same_files(kit, logged, tmp_path, unit, at):
    options = {"unit": getattr(kit, unit)}
    if unit == "ITERATION":
        options |= {"total_steps": 8, "chkpt_frequency": 3, "valid_frequency": 2}
    whole = logged(tmp_path / "whole", **options)
    logged(tmp_path / "two", abort_at=int(len(whole.trace) * at), **options)
    logged(tmp_path / "two", **options)
    (log,) = (tmp_path / "two" / "deep" / "logs").iterdir()
    (whole_folder,), (folder,) = ((tmp_path / r / "deep" / "runs").iterdir() for r in ("whole", "two"))
    scalars = accumulated(folder)
    assert scalars == accumulated(whole_folder)
    assert ("scores_a", "scores") in scalars
    assert [step for step, _ in scalars[".", "loss"]] == list(range(1, 9 if unit == "ITERATION" else 10))
    text = log.read_text()
    assert "AbortError" in text and "finished: total_steps reached" in text


def test_control_without_purging_steps_are_shown_twice(kit, logged, tmp_path, monkeypatch):
    monkeypatch.setattr("helios.trainer.logging._loggers.purge_events", lambda folder, sizes: None)
    with pytest.raises(AssertionError):
        test_an_interrupted_run_goes_on_in_the_same_files(kit, logged, tmp_path, "EPOCH", 0.5)


@pytest.mark.parametrize("is_killed", [True, False])
def test_killed_before_the_first_checkpoint(kit, python, tmp_path, is_killed):
    """The next start goes on in the same files; only one that could clean up begins new ones."""
    python(kit.INTERRUPTED, "die" if is_killed else "fail", "3", "2", check=False)
    assert not list((tmp_path / "c").glob("*.pth"))
    python(kit.INTERRUPTED, "live", "3", "2")
    folders = sorted((tmp_path / "t").iterdir())
    assert len(folders) == len(list((tmp_path / "l").iterdir())) == (1 if is_killed else 2)
    assert [step for step, _ in accumulated(folders[-1])[".", "loss"]] == list(range(1, 9))
    assert sorted(path.suffix for path in (tmp_path / "c").iterdir()) == [".pth", ".pth"]


def test_a_log_that_ends_in_mid_line_is_not_continued_in_that_line(logged, tmp_path):
    whole = logged(tmp_path / "whole")
    logged(tmp_path, abort_at=len(whole.trace) // 2)
    (log,) = (tmp_path / "deep" / "logs").iterdir()
    with log.open("ab") as file:
        file.write(b"[2026-01-01 00:00:00] INFO: torn ti")
    logged(tmp_path)
    lines = log.read_text().splitlines()
    torn = lines.index("[2026-01-01 00:00:00] INFO: torn ti")
    assert re.fullmatch(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] INFO: iteration \d+", lines[torn + 1])


def test_a_finished_run_touches_no_event_file(logged, tmp_path):
    logged(tmp_path)
    before = {p: p.stat().st_size for p in (tmp_path / "deep" / "runs").rglob("*") if p.is_file()}
    logged(tmp_path)
    assert {p: p.stat().st_size for p in (tmp_path / "deep" / "runs").rglob("*") if p.is_file()} == before
    (log,) = (tmp_path / "deep" / "logs").iterdir()
    assert "nothing to do" in log.read_text()


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.filterwarnings("default::UserWarning")
def test_warnings(kit, logged, tmp_path, capture):
    class Warned(kit.Net):
        def train_step(self, batch, state):
            warnings.warn("careful", UserWarning, stacklevel=1)
            super().train_step(batch, state)

    def fit():
        logged(tmp_path, model=Warned, capture_warnings=capture, total_steps=1)

    if capture:
        fit()
    else:
        with pytest.warns(UserWarning, match="careful"):
            fit()
    (log,) = (tmp_path / "deep" / "logs").iterdir()
    assert ("careful" in log.read_text()) is capture


def test_capturing_that_was_on_before_stays_on(logged, tmp_path):
    logging.captureWarnings(True)
    try:
        before = warnings.showwarning
        logged(tmp_path, capture_warnings=True, total_steps=1)
        assert warnings.showwarning is before
    finally:
        logging.captureWarnings(False)


def test_a_traceback_is_in_the_file_but_not_on_the_console(kit, logged, tmp_path, capsys):
    class Failing(kit.Net):
        def train_step(self, batch, state):
            raise ZeroDivisionError("on purpose")

    with pytest.raises(RuntimeError, match="training failed: ZeroDivisionError: on purpose"):
        logged(tmp_path, model=Failing)
    (log,) = (tmp_path / "deep" / "logs").iterdir()
    text = log.read_text()
    assert "Traceback (most recent call last)" in text
    assert "ZeroDivisionError: on purpose" in text
    assert "in train_step" in text
    console = capsys.readouterr().out
    assert "ZeroDivisionError: on purpose" in console and "Traceback" not in console


def test_after_a_run_there_is_no_writer_and_no_open_file(kit, logged, tmp_path):
    inside = []

    class Looking(kit.Net):
        def train_step(self, batch, state):
            inside.append((get_tensorboard_writer(), len(get_root_logger().handlers)))
            super().train_step(batch, state)

    logged(tmp_path, model=Looking, total_steps=1)
    assert inside[0][0] is not None and inside[0][1] == 2
    assert get_tensorboard_writer() is None
    assert get_root_logger().handlers == []
    inside.clear()
    kit.trainer(total_steps=1).fit(Looking(), kit.Data())
    assert inside[0] == (None, 1)


@pytest.mark.parametrize("wrong", ["log_path", "run_path"])
def test_a_place_that_cannot_be_written_leaves_nothing_open(kit, tmp_path, wrong):
    options = {"log_path": tmp_path / "l", "run_path": tmp_path / "r", wrong: tmp_path / "later" / "folder"}
    trainer = kit.trainer(enable_file_logging=True, enable_tensorboard=True, **options)
    (tmp_path / "later").write_text("a file where a folder is to be")
    with pytest.raises(RuntimeError):
        trainer.fit(kit.Net(), kit.Data())
    assert get_root_logger().handlers == []


def test_a_closed_console_does_not_end_the_run(kit, monkeypatch, tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(logging, "raiseExceptions", False)
    trainer = kit.trainer(total_steps=1, enable_file_logging=True, log_path=tmp_path)
    model = kit.Net()
    monkeypatch.setattr(sys, "stdout", Closed())
    trainer.fit(model, kit.Data())
    monkeypatch.undo()
    assert "finished: total_steps" in next(tmp_path.iterdir()).read_text()


def test_tensorboard_is_not_imported_unless_enabled(python):
    code = """if True:
        import sys
        import helios.trainer as hlt
        from helios.trainer.logging import get_tensorboard_writer
        assert "tensorboard" not in sys.modules
        class M(hlt.Model):
            def setup(self, fast_init=False): pass
            def train_step(self, batch, state): assert get_tensorboard_writer() is None
        from helios.data import DataModule
        class D(DataModule):
            def setup(self): self._train_dataset = self._create_dataset([1, 2], {"batch_size": 2})
        hlt.Trainer(total_steps=1, use_cpu=True).fit(M("m"), D())
        print("tensorboard" in sys.modules)
    """
    assert python(code).splitlines()[-1] == "False"


def test_the_banner_and_the_summary(kit, tmp_path, capsys):
    class Speaking(kit.Net):
        def append_to_banner(self, banner):
            return banner + "\n  and a word of its own"

    options = {"chkpt_root": tmp_path, "chkpt_frequency": 1, "print_banner": True}
    kit.trainer(total_steps=1, **options).fit(Speaking(), kit.Data())
    first = capsys.readouterr().out
    assert "run net, 1 epochs, from the beginning" in first
    assert "seed 6691" in first and "a word of its own" in first
    assert "finished: total_steps reached; epoch 1, iteration 3; 3 batches in" in first
    kit.trainer(total_steps=2, **options).fit(Speaking(), kit.Data())
    assert f"from {tmp_path / 'net_epoch_1_iter_3.pth'}" in capsys.readouterr().out
    kit.trainer(total_steps=1).fit(Speaking(), kit.Data())
    assert "a word of its own" not in capsys.readouterr().out
