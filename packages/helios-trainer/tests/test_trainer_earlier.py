"""Going on with runs that earlier releases began, from what a migration makes of their checkpoints.

Such a checkpoint is made here of one of this release, by leaving out what those releases did not keep. The run that
goes on from it must end as the run that was never interrupted, which took torch's order from the start.
"""

import logging

import pytest
import torch

from helios.chkpt import CheckpointName, find_last_checkpoint, format_name, load, save

pytestmark = pytest.mark.long

COUNTERS = (
    "current_iteration",
    "global_iteration",
    "global_epoch",
    "validation_cycles",
    "dataset_iter",
    "early_stop_count",
    "average_iter_time",
    "running_iter",
)


@pytest.fixture
def warnings_of(caplog):
    """Text of the warnings that runs logged."""

    def text():
        return "\n".join(r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)

    return text


def as_earlier(path, root, batch_size=2, **changes):
    """Put into `root` what a migrated file of an earlier release would hold instead of `path`."""
    state = load(path)
    del state["version"]
    fields = {name: state["training_state"][name] for name in COUNTERS}
    batches = fields["dataset_iter"]
    state["training_state"] = fields
    state["data"] = {
        "format": 0,
        "algorithm": "torch-randperm-v1",
        "epoch": fields["global_epoch"] - (batches > 0),
        "batches": batches,
    }
    state |= changes
    root.mkdir(exist_ok=True)
    name = CheckpointName("net", fields["global_epoch"], fields["current_iteration"])
    save(state, root / format_name(name))
    return fields


def run(kit, root, *, order=None, plugins=(), abort_at=None, total_steps=None, data=None, **options):
    trainer = kit.trainer(chkpt_root=root, total_steps=total_steps, **options)
    model = kit.Net(accumulation=options.get("accumulation_steps", 1), abort_at=abort_at)
    for make in plugins:
        trainer.plugins.append(make(model.trace))
    try:
        trainer.fit(model, kit.Data(**{"order": order, **(data or {})}))
    except kit.AbortError:
        return model
    model.end = kit.end_of(model)
    return model


SETUPS = {
    "epochs": {"unit": "EPOCH", "total_steps": 4, "valid_frequency": 1, "chkpt_frequency": 1},
    "epochs, seldom validated": {
        "unit": "EPOCH", "total_steps": 4, "valid_frequency": 4, "chkpt_frequency": 1,
    },
    "iterations": {"unit": "ITERATION", "total_steps": 10, "valid_frequency": 2, "chkpt_frequency": 2},
    "iterations, accumulating": {
        "unit": "ITERATION", "total_steps": 8, "valid_frequency": 2, "chkpt_frequency": 2, "accumulation_steps": 2,
    },
    "with workers": {
        "unit": "ITERATION", "total_steps": 8, "valid_frequency": 2, "chkpt_frequency": 4,
        "data": {"num_workers": 2, "train": 5},
    },
    "dropping the last": {
        "unit": "ITERATION", "total_steps": 8, "valid_frequency": 2, "chkpt_frequency": 2, "data": {"drop_last": True},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SETUPS)
def test_it_ends_as_the_run_that_was_never_interrupted(kit, tmp_path, name):
    setup = {**SETUPS[name], "unit": getattr(kit, SETUPS[name]["unit"])}
    whole = run(kit, tmp_path / "whole", order="torch", **setup)
    plain = run(kit, tmp_path / "plain", **setup)
    assert plain.batches != whole.batches  # control: the default order is another
    paths = sorted(
        (tmp_path / "whole").glob("*.pth"), key=lambda p: load(p)["training_state"]["global_iteration"]
    )
    for number, path in enumerate(paths[:-1]):
        root = tmp_path / str(number)
        as_earlier(path, root)
        rest = run(kit, root, **setup)
        assert rest.batches == whole.batches[len(whole.batches) - len(rest.batches) :]
        assert rest.batches
        assert rest.end == whole.end
        root = tmp_path / f"{number}, twice"
        as_earlier(path, root)
        run(kit, root, **setup, abort_at=len(rest.trace) * 2 // 3)
        again = run(kit, root, **setup)
        assert again.end == whole.end


def test_the_check_after_the_validation_is_not_made_again(kit, tmp_path):
    setup = {"unit": kit.EPOCH, "total_steps": 4, "valid_frequency": 2, "chkpt_frequency": 1}
    run(kit, tmp_path / "whole", order="torch", **setup)
    for epoch, first in (
        (1, "on_training_epoch_end"),
        (2, "should_training_stop"),
        (3, "on_training_epoch_end"),
    ):
        root = tmp_path / str(epoch)
        as_earlier(tmp_path / "whole" / f"net_epoch_{epoch}_iter_{3 * epoch}.pth", root)
        rest = run(kit, root, **setup)
        names = kit.names(rest.trace)[3:]
        assert names[0] == first
        assert names[: names.index("on_training_epoch_start")].count("have_metrics_improved") == 0


def test_by_iteration_from_the_end_of_an_epoch(kit, tmp_path):
    """Its data stands at the next epoch, whether the file says all batches or 0 of the next."""
    setup = {"unit": kit.ITERATION, "total_steps": 7, "valid_frequency": 3, "chkpt_frequency": 3}
    whole = run(kit, tmp_path / "whole", order="torch", **setup)
    path = tmp_path / "whole" / "net_epoch_1_iter_3.pth"
    for batches, epoch in ((3, 0), (0, 1)):
        data = {"format": 0, "algorithm": "torch-randperm-v1", "epoch": epoch, "batches": batches}
        fields = {**{k: load(path)["training_state"][k] for k in COUNTERS}, "dataset_iter": batches}
        root = tmp_path / str(batches)
        as_earlier(path, root, data=data, training_state=fields)
        rest = run(kit, root, **setup)
        names = ["should_training_stop", "on_training_epoch_end", "on_training_epoch_start"]
        assert kit.names(rest.trace)[3:6] == names
        assert rest.end == whole.end


def test_what_is_taken_on_trust_is_said(kit, tmp_path, warnings_of):
    setup = {"unit": kit.ITERATION, "chkpt_frequency": 2}
    run(kit, tmp_path / "whole", order="torch", total_steps=4, **setup)
    as_earlier(tmp_path / "whole" / "net_epoch_1_iter_2.pth", tmp_path / "a")
    assert warnings_of() == ""
    run(kit, tmp_path / "a", total_steps=4, random_seed=99, data={"random_seed": 5}, **setup)
    assert "an earlier release of Helios began" in warnings_of()
    assert "random_seed=5, which the training loader has" in warnings_of()
    assert "the trainer has random_seed=99" in warnings_of()
    run(kit, tmp_path / "a", total_steps=6, random_seed=99, data={"random_seed": 5}, **setup)
    assert warnings_of().count("an earlier release of Helios began") == 1  # a run of this release now


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "EPOCH"}, r"of a run by ITERATION .*\(it was saved 2 batches into an epoch\)"),
        ({"unit": "ITERATION", "accumulation_steps": 2}, "with accumulation_steps=1, this trainer has"),
    ],
)  # fmt: skip
def test_settings_that_the_counters_contradict_are_refused(kit, tmp_path, options, message):
    run(kit, tmp_path / "whole", unit=kit.ITERATION, chkpt_frequency=2, total_steps=2, order="torch")
    path = find_last_checkpoint(tmp_path / "whole")
    as_earlier(path, tmp_path / "a")
    options = {**options, "unit": getattr(kit, options["unit"])}
    with pytest.raises(RuntimeError, match=message):
        run(kit, tmp_path / "a", total_steps=9, **options)


def test_accumulation_by_iteration_is_not_gone_on_with_by_epoch(kit, tmp_path):
    setup = {"unit": kit.ITERATION, "accumulation_steps": 3, "chkpt_frequency": 1}
    run(kit, tmp_path / "whole", total_steps=1, order="torch", **setup)
    path = find_last_checkpoint(tmp_path / "whole")
    fields = {**{k: load(path)["training_state"][k] for k in COUNTERS}, "dataset_iter": 0}
    as_earlier(path, tmp_path / "a", training_state=fields)
    with pytest.raises(RuntimeError, match="it has 1 iterations in 3 batches"):
        run(kit, tmp_path / "a", total_steps=9)


def test_a_loader_with_an_order_of_its_own_is_refused(kit, tmp_path):
    from helios.data import WeightedOrder

    run(kit, tmp_path / "whole", chkpt_frequency=1, total_steps=1, order="torch")
    as_earlier(find_last_checkpoint(tmp_path / "whole"), tmp_path / "a")
    with pytest.raises(RuntimeError, match="begun by an earlier release"):
        run(kit, tmp_path / "a", total_steps=2, order=WeightedOrder([1.0] * 6), data={"shuffle": False})


# Plug-ins


def test_a_plug_ins_state_comes_back(kit, tmp_path):
    setup = {"total_steps": 4, "valid_frequency": 1, "chkpt_frequency": 1, "plugins": [kit.NotingPlugin]}
    run(kit, tmp_path / "whole", order="torch", **setup)
    as_earlier(tmp_path / "whole" / "net_epoch_2_iter_6.pth", tmp_path / "a")
    run(kit, tmp_path / "a", **setup)
    assert load(find_last_checkpoint(tmp_path / "a"))["plug"] == {"count": 4}


def test_releases_that_kept_no_plug_ins(kit, tmp_path, warnings_of):
    """1.1 and 1.2.0 had plug-ins and kept nothing of them: all begin anew, if there is no state of any."""
    setup = {"total_steps": 4, "valid_frequency": 1, "chkpt_frequency": 1}
    run(kit, tmp_path / "whole", order="torch", **setup)
    path = tmp_path / "whole" / "net_epoch_2_iter_6.pth"
    as_earlier(path, tmp_path / "a")
    run(kit, tmp_path / "a", **setup, plugins=[kit.NotingPlugin])
    assert (
        "has no state of any plug-in (releases of Helios before 1.2.7 kept none): plug begins anew"
        in warnings_of()
    )
    assert load(find_last_checkpoint(tmp_path / "a"))["plug"] == {"count": 2}
    as_earlier(path, tmp_path / "b", other={"count": 1})
    with pytest.raises(RuntimeError, match="has no state of the plug-in 'plug'"):
        run(kit, tmp_path / "b", **setup, plugins=[kit.NotingPlugin])


def test_what_is_left_of_other_releases_is_named(kit, tmp_path, warnings_of):
    run(kit, tmp_path / "whole", chkpt_frequency=1, total_steps=1, order="torch")
    left = {"loggers": {"wandb": {"run_id": "x"}}, "datamodule": {"phase": 1}}
    as_earlier(find_last_checkpoint(tmp_path / "whole"), tmp_path / "a", **left)
    run(kit, tmp_path / "a", total_steps=2)
    assert "has state under datamodule, loggers, which is no plug-in of this trainer" in warnings_of()


# Places of logs


def scalars(folder):
    """The steps of each scalar, sorted: files that begin in the same second are in no certain order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = {}
    for path in folder.iterdir():
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            steps[tag] = sorted([*steps.get(tag, []), *(event.step for event in events.Scalars(tag))])
    return steps


def test_logs_that_are_still_there_go_on(kit, tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    log, folder = tmp_path / "old.log", tmp_path / "old"
    log.write_text("of the earlier release\n")
    with SummaryWriter(str(folder)) as writer:
        for step in range(1, 8):
            writer.add_scalar("loss", 0.0, step)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    run(kit, tmp_path / "whole", chkpt_frequency=1, total_steps=2, order="torch")
    path = tmp_path / "whole" / "net_epoch_1_iter_3.pth"
    as_earlier(path, tmp_path / "a", log_path=str(log), run_path=str(folder))
    places = {"log_path": tmp_path / "logs", "run_path": tmp_path / "runs"}
    options = {"enable_file_logging": True, "enable_tensorboard": True, **places}
    run(kit, tmp_path / "a", total_steps=2, chkpt_frequency=1, **options)
    assert log.read_text().startswith("of the earlier release\n")
    assert "finished" in log.read_text()
    assert not places["log_path"].exists()
    assert not places["run_path"].exists()
    assert {path: path.read_bytes() for path in before} == before  # nothing of it is purged
    assert scalars(folder)["loss"] == list(range(1, 8))
    assert load(find_last_checkpoint(tmp_path / "a"))["log_path"] == str(log)


@pytest.mark.parametrize("gone", ["/no/such/folder/a", "C:\\runs\\a", "relative/a"])
def test_logs_that_are_gone_begin_anew_where_they_would(kit, tmp_path, gone, warnings_of, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(kit, tmp_path / "whole", chkpt_frequency=1, total_steps=2, order="torch")
    as_earlier(tmp_path / "whole" / "net_epoch_1_iter_3.pth", tmp_path / "a", log_path=gone, run_path=gone)
    options = {"enable_file_logging": True, "log_path": tmp_path / "logs", "total_steps": 2}
    run(kit, tmp_path / "a", **options)
    (log,) = (tmp_path / "logs").iterdir()
    assert f"the run's log file is gone, a new one is begun if it is enabled: {gone}" in log.read_text()
    assert f"TensorBoard folder is gone, a new one is begun if it is enabled: {gone}" in warnings_of()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "logs", "whole"]


def test_checkpoints_of_earlier_releases_that_would_be_overlooked(kit, tmp_path, warnings_of):
    """They are in a folder named after the model, and named after it whatever the run's name."""
    run(kit, tmp_path / "whole", chkpt_frequency=1, total_steps=1, order="torch")
    as_earlier(find_last_checkpoint(tmp_path / "whole"), tmp_path / "net")
    for root, run_name in ((tmp_path, ""), (tmp_path, "mine"), (tmp_path / "net", "mine")):
        run(kit, root, run_name=run_name, total_steps=1)
        assert f"run {run_name or 'net'} begins anew, although there are checkpoints" in warnings_of()
    assert "chkpt_root to that folder and run_name to 'net'" in warnings_of()
    count = warnings_of().count("begins anew")
    run(kit, tmp_path / "net", total_steps=1)
    run(kit, tmp_path / "nothing", run_name="mine", total_steps=1)
    assert warnings_of().count("begins anew") == count


def test_tables_that_nobody_kept_begin_empty(kit, tmp_path):
    setup = {"unit": kit.ITERATION, "total_steps": 6, "valid_frequency": 6, "chkpt_frequency": 2}
    whole = run(kit, tmp_path / "whole", order="torch", **setup)
    as_earlier(tmp_path / "whole" / "net_epoch_2_iter_4.pth", tmp_path / "a")
    rest = run(kit, tmp_path / "a", **setup)
    # Documented: the first mean after the resume lacks the losses from before it, as it did in those releases.
    (whole_mean,), (mean,) = ([c[2] for c in m.trace if c[0] == "on_validation_end"] for m in (whole, rest))
    assert mean < whole_mean
    assert kit.bits(rest.state_dict()) == kit.bits(whole.state_dict())
    assert isinstance(rest.net[0].weight, torch.Tensor)


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("is_killed", [True, False])
def test_killed_before_its_first_own_checkpoint(kit, scripts, tmp_path, is_there, is_killed):
    """The next start goes on in the same files, and shows each scalar once; as long as it was killed, and no more."""
    from torch.utils.tensorboard import SummaryWriter

    from helios.core.rng import get_rng_state_dict, seed_rngs

    old = tmp_path / "old"
    if is_there:
        with SummaryWriter(str(old)) as writer:
            for step in range(1, 5):
                writer.add_scalar("loss", step, step)
    seed_rngs()
    counters = dict(zip(COUNTERS, (4, 4, 1, 0, 0, 0, 0.0, 4), strict=True))
    data = {"format": 0, "algorithm": "torch-randperm-v1", "epoch": 1, "batches": 0}
    (tmp_path / "c").mkdir()
    save(
        {
            "training_state": counters,
            "model": {},
            "rng": get_rng_state_dict(),
            "data": data,
            "run_path": str(old),
        },
        tmp_path / "c" / "r_epoch_1_iter_4.pth",
    )
    scripts(kit.INTERRUPTED, "die" if is_killed else "fail", "7", "3", folder=tmp_path)
    done = scripts(kit.INTERRUPTED, "live", "7", "3", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "l").iterdir())) == (1 if is_killed else 2)
    folders = [old] if is_there else sorted((tmp_path / "t").iterdir())
    assert len(folders) == (1 if is_killed or is_there else 2)
    steps = scalars(folders[-1])["loss"]
    if is_killed or not is_there:
        assert steps == list(range(1 if is_there else 5, 13))
    else:
        assert len(steps) > 12  # documented: what came after the checkpoint is there twice
    assert not list((tmp_path / "c").glob(".*"))
