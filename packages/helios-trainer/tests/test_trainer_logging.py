"""Log files and TensorBoard: names, content, going on after an interruption, and leaving no trace behind."""

import contextlib
import io
import logging
import re
import sys
import warnings
from datetime import datetime
from pathlib import Path

import pytest
import torch

import helios.trainer.logging
from helios.chkpt import find_last_checkpoint, load
from helios.trainer import Trainer
from helios.trainer.logging import _places, get_root_logger, get_tensorboard_writer
from helios.trainer.logging._places import choose_targets

pytestmark = pytest.mark.long


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
            # Files of one second are read by name, in which 10 comes before 9: that order is nobody's.
            values = sorted((event.step, event.value) for event in reader.Scalars(tag))
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


@pytest.mark.parametrize(
    ("moment", "name"),
    [
        (datetime(2024, 11, 22, 15, 20, 1), "cifar10_Nov22_15-20-01"),
        (datetime(2024, 3, 4, 5, 6, 7), "cifar10_Mar04_05-06-07"),
    ],
)
def test_names(logged, tmp_path, monkeypatch, moment, name):
    class Frozen(datetime):
        @classmethod
        def now(cls):
            return moment

    monkeypatch.setattr(_places, "datetime", Frozen)
    logged(tmp_path, run_name="cifar10")
    (log,) = (tmp_path / "deep" / "logs").iterdir()
    (folder,) = (tmp_path / "deep" / "runs").iterdir()
    assert (log.name, folder.name) == (f"{name}.log", name)
    checkpoint = load(find_last_checkpoint(tmp_path / "chkpt"))
    assert (checkpoint["log_path"], checkpoint["run_path"]) == (str(log), str(folder))


@pytest.mark.parametrize("create", ["touch", "mkdir"])
def test_a_name_that_another_process_takes_at_the_same_moment(tmp_path, monkeypatch, create):
    """As those of a script that starts many runs at once, with logs in one place."""
    files, folders = tmp_path / "l", tmp_path / "t"
    real, taken = getattr(Path, create), []

    def late(path, *arguments, **options):
        if not taken and path.parent in (files, folders):
            taken.append(path)
            real(path)  # the other process was faster
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, create, late)
    chosen = choose_targets("r", files, folders)
    monkeypatch.undo()
    assert taken[0] not in (chosen.log_file, chosen.run_folder)
    left = {chosen.log_file, chosen.run_folder, taken[0]}
    assert {*files.iterdir(), *folders.iterdir()} == left  # what was created beside the taken one is gone
    assert choose_targets("r", files, folders, [chosen]) == chosen  # a run that goes on creates nothing
    assert {*files.iterdir(), *folders.iterdir()} == left


@pytest.mark.parametrize(
    "name", ["a b", "100% %s %(x)s", "{name}", "naïve ñ 名前", "[a]*?", "-r", "~r", "..."]
)
def test_any_run_name(kit, logged, tmp_path, name):
    whole = logged(tmp_path / "whole", run_name=name)
    logged(tmp_path, run_name=name, abort_at=len(whole.trace) // 2)
    logged(tmp_path, run_name=name, print_banner=True)
    (log,) = (tmp_path / "deep" / "logs").iterdir()
    (folder,) = (tmp_path / "deep" / "runs").iterdir()
    assert log.name.startswith(f"{name}_") and log.suffix == ".log" and folder.name == log.stem
    assert f"Helios: run {name}, 3 epochs, goes on from" in log.read_text(encoding="utf-8")
    assert [step for step, _ in accumulated(folder)[".", "loss"]] == list(range(1, 10))


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


def everything(folder):
    """All that TensorBoard reads below a folder: [(sub-folder, kind, tag, step), ...]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found, kinds = [], ("scalars", "images", "tensors", "histograms")
    for path in sorted({p.parent for p in folder.rglob("events.out.tfevents.*")}):
        reader = EventAccumulator(str(path), dict.fromkeys(kinds, 0), purge_orphaned_data=False)
        reader.Reload()
        tags = reader.Tags()
        for kind, read in (
            ("scalars", reader.Scalars),
            ("images", reader.Images),
            ("tensors", reader.Tensors),
        ):
            found += [(path.name, kind, tag, event.step) for tag in tags[kind] for event in read(tag)]
        for tag in tags["histograms"]:
            found += [(path.name, "histograms", tag, event.step) for event in reader.Histograms(tag)]
    return sorted(found)


@pytest.fixture
def drawing(kit):
    """A model that logs all kinds of things, in sub-folders too, and whose writer it closes now and then."""

    class Drawing(kit.Net):
        def on_training_batch_end(self, state, should_log=False):
            super().on_training_batch_end(state, should_log)
            writer, step = get_tensorboard_writer(), state.global_iteration
            writer.add_scalar("loss", self._loss_items["loss"].item(), step)
            writer.add_histogram("weights", self.net[0].weight, step)
            writer.add_image("image", torch.full((3, 4, 4), 0.5), step)
            writer.add_text("text", f"iteration {step}", step)
            if step % 2:
                writer.close()  # opens again by itself

        def on_training_epoch_end(self, epoch):
            super().on_training_epoch_end(epoch)
            writer = get_tensorboard_writer()
            writer.add_scalars("curves", {"a": epoch, "b": -epoch}, 10 * epoch)
            writer.add_hparams({"lr": 0.1}, {"epoch": epoch}, run_name=f"trial{epoch}")

    return Drawing


def test_whatever_tensorboard_takes_is_there_once(kit, logged, drawing, tmp_path):
    root = tmp_path / "whole"
    whole = logged(root, model=drawing)
    expected = everything(root / "deep" / "runs")
    kinds = {kind for _, kind, _, _ in expected}
    assert kinds == {"scalars", "images", "tensors", "histograms"}
    assert {step for _, kind, _, step in expected if kind == "images"} == set(range(1, 10))
    assert any(place == "trial3" for place, _, _, _ in expected)
    for at in (0.45, 0.6, 0.8):
        part = tmp_path / str(at)
        logged(part, model=drawing, abort_at=int(len(whole.trace) * at))
        before = everything(part / "deep" / "runs")
        logged(part, model=drawing)
        found = everything(part / "deep" / "runs")
        strip = {folder.name for root in (root, part) for folder in (root / "deep" / "runs").iterdir()}
        plain = [
            [("" if p in strip else p, *rest) for p, *rest in each] for each in (expected, found, before)
        ]
        assert sorted(plain[1]) == sorted(plain[0])
        assert 0 < len(plain[2]) < len(plain[0])  # it was interrupted in the middle


def test_killed_after_a_checkpoint(kit, scripts, tmp_path):
    """By the process's end, without any cleaning up; twice."""
    for at in (7, 10):
        scripts(kit.INTERRUPTED, "die", at, "3", folder=tmp_path)
    assert list((tmp_path / "c").glob("*.pth"))
    done = scripts(kit.INTERRUPTED, "live", "0", "3", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,), (log,) = (tmp_path / "t").iterdir(), (tmp_path / "l").iterdir()
    scalars = accumulated(folder)
    assert scalars == {(".", "loss"): [(step, float(step)) for step in range(1, 13)]}
    assert "finished: total_steps reached" in log.read_text()


@pytest.mark.parametrize("is_killed", [True, False])
def test_killed_before_the_first_checkpoint(kit, scripts, tmp_path, is_killed):
    """The next start goes on in the same files; only one that could clean up begins new ones."""
    scripts(kit.INTERRUPTED, "die" if is_killed else "fail", "3", "2", folder=tmp_path)
    assert not list((tmp_path / "c").glob("*.pth"))
    done = scripts(kit.INTERRUPTED, "live", "3", "2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "t").iterdir())
    assert len(folders) == len(list((tmp_path / "l").iterdir())) == (1 if is_killed else 2)
    assert [step for step, _ in accumulated(folders[-1])[".", "loss"]] == list(range(1, 9))
    assert sorted(path.suffix for path in (tmp_path / "c").iterdir()) == [".pth", ".pth"]


def test_logs_that_are_gone_are_begun_anew(kit, logged, tmp_path):
    """Or a run that was moved to another machine could not go on."""
    whole = logged(tmp_path / "whole")
    logged(tmp_path, abort_at=len(whole.trace) // 2)
    (tmp_path / "deep").rename(tmp_path / "moved")
    (tmp_path / "deep").write_text("nothing can be made in here")
    logged(tmp_path, log_path=tmp_path / "new" / "logs", run_path=tmp_path / "new" / "runs")
    (log,) = (tmp_path / "new" / "logs").iterdir()
    (folder,) = (tmp_path / "new" / "runs").iterdir()
    assert "finished" in log.read_text()
    assert accumulated(folder)[".", "loss"][-1][0] == 9
    checkpoint = load(find_last_checkpoint(tmp_path / "chkpt"))
    assert (checkpoint["log_path"], checkpoint["run_path"]) == (str(log), str(folder))


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
    text = log.read_text()
    assert ("careful" in text) is capture
    assert "\n\n" not in text


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


def test_a_level_that_was_chosen_is_kept(kit, tmp_path):
    class Talking(kit.Net):
        def on_training_start(self):
            get_root_logger().debug("a detail")
            get_root_logger().info("information")

    for level, said in (
        (logging.DEBUG, {"a detail", "information"}),
        (logging.WARNING, set()),
        (0, {"information"}),
    ):
        place = tmp_path / str(level)
        get_root_logger().setLevel(level)
        try:
            kit.trainer(total_steps=1, enable_file_logging=True, log_path=place).fit(Talking(), kit.Data())
        finally:
            get_root_logger().setLevel(logging.NOTSET)
        text = next(place.iterdir()).read_text()
        assert {words for words in ("a detail", "information") if words in text} == said


def test_a_run_that_ends_before_it_logs_leaves_no_empty_folder(kit, tmp_path):
    class Unprepared(kit.Net):
        def setup(self, fast_init=False):
            raise ZeroDivisionError

    places = {"log_path": tmp_path / "l", "run_path": tmp_path / "r", "chkpt_root": tmp_path / "c"}
    options = {"enable_file_logging": True, "enable_tensorboard": True, "chkpt_frequency": 1, **places}
    kit.trainer(**options).fit(kit.Net(), kit.Data())
    (log,) = places["log_path"].iterdir()
    for path in places["run_path"].iterdir():
        path.rename(tmp_path / "elsewhere")
    kit.trainer(**options).fit(kit.Net(), kit.Data())  # has finished
    assert list(places["run_path"].iterdir()) == []
    with pytest.raises(RuntimeError):
        kit.trainer(**{**options, "random_seed": 5}).fit(kit.Net(), kit.Data())  # refused
    assert list(places["run_path"].iterdir()) == []
    assert list(places["log_path"].iterdir()) == [log] and "random_seed" in log.read_text()


def test_folders_without_permission(python, tmp_path):
    """At construction, and by name. In a process of its own, which gives up being root if it is."""
    code = """if True:
        import os, sys, warnings
        warnings.simplefilter("ignore")
        import tensorboard  # now: that user may not be able to find it
        import helios.trainer as hlt
        os.chmod(".", 0o777); os.mkdir("closed"); os.chmod("closed", 0o555); os.umask(0)
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            open("closed/file", "w")
        except PermissionError:
            pass
        else:
            sys.exit("control: it can be written")
        for flag, name in (("enable_file_logging", "log_path"), ("enable_tensorboard", "run_path")):
            for path in ("closed", "closed/deep/er"):
                try:
                    hlt.Trainer(use_cpu=True, **{flag: True, name: path})
                except ValueError as error:
                    print(error)
            hlt.Trainer(use_cpu=True, **{flag: True, name: "open/deep/er"})
            hlt.Trainer(use_cpu=True, **{name: "closed"})  # nothing is to be written there
    """
    # Of the relative path only its own folders are asked about, for those above may be closed to that user.
    lines = python(code).splitlines()
    for line, (flag, name, path) in zip(lines, [
        (flag, name, path)
        for flag, name in (("enable_file_logging", "log_path"), ("enable_tensorboard", "run_path"))
        for path in ("closed", "closed/deep/er")
    ], strict=True):  # fmt: skip
        assert line == (
            f"{flag} is True, but {name} cannot be written to: found {path}, where closed gives this user no "
            f"permission to write; choose another {name}, or leave {flag} False"
        )


def test_without_tensorboard(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    Trainer(use_cpu=True, run_path=tmp_path)
    with pytest.raises(
        ModuleNotFoundError, match=r"enable_tensorboard is True, but .* pip install tensorboard"
    ):
        Trainer(use_cpu=True, enable_tensorboard=True, run_path=tmp_path)


@pytest.mark.parametrize("wrong", ["log_path", "run_path"])
@pytest.mark.parametrize("place", ["later", "later/folder"])
def test_a_place_that_cannot_be_written_leaves_nothing_open(kit, tmp_path, wrong, place):
    options = {"log_path": tmp_path / "l", "run_path": tmp_path / "r", wrong: tmp_path / place}
    trainer = kit.trainer(enable_file_logging=True, enable_tensorboard=True, **options)
    (tmp_path / "later").write_text("a file where a folder is to be")
    with pytest.raises(RuntimeError, match=f"{wrong}: .*later"):
        trainer.fit(kit.Net(), kit.Data())
    assert get_root_logger().handlers == []
    other = tmp_path / ("r" if wrong == "log_path" else "l")
    assert not other.exists() or list(other.iterdir()) == []


def test_a_closed_console_does_not_end_the_run(kit, monkeypatch, tmp_path, capsys):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError("closed")

    trainer = kit.trainer(total_steps=1, enable_file_logging=True, log_path=tmp_path, print_banner=True)
    model = kit.Net()
    monkeypatch.setattr(sys, "stdout", Closed())
    trainer.fit(model, kit.Data())
    monkeypatch.undo()
    assert "finished: total_steps" in next(tmp_path.iterdir()).read_text()
    assert capsys.readouterr().err == "log lines are lost, stdout cannot be written: closed\n"
    monkeypatch.setattr(sys, "stdout", None)  # as it is where the process has none
    kit.trainer(total_steps=1).fit(kit.Net(), kit.Data())


def test_a_full_disk_under_the_log_file_does_not_end_the_run(python, tmp_path):
    """And is said once. No file of this process may be longer than 2000 bytes."""
    code = """if True:
        import resource
        import helios.trainer as hlt
        from helios.data import DataModule
        from helios.trainer.logging import get_root_logger
        class M(hlt.Model):
            def setup(self, fast_init=False): pass
            def train_step(self, batch, state): get_root_logger().info("line %d", state.global_iteration)
        class D(DataModule):
            def setup(self): self._train_dataset = self._create_dataset(list(range(99)), {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        import contextlib, io
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            hlt.Trainer(total_steps=1, use_cpu=True, enable_file_logging=True, log_path="logs").fit(M("m"), D())
        print(errors.getvalue())
    """
    out = python(code)
    (log,) = (tmp_path / "logs").iterdir()
    assert log.stat().st_size == 2000
    assert "line 99" in out and "finished" in out
    (said,) = [line for line in out.splitlines() if "lost" in line]
    assert said.startswith(f"log lines are lost, logs/{log.name} cannot be written: ")
    assert "Traceback" not in out


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


def test_what_is_public():
    assert helios.trainer.logging.__all__ == ["get_root_logger", "get_tensorboard_writer"]
