"""A ledger has every step once, whatever kills the run, and names the first step and component at which two part."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helios.trainer._digest import digest
from helios.trainer.ledger import Ledger, LedgerError, diff
from helios.trainer.ledger._command import main

pytestmark = pytest.mark.long

JOB = Path(__file__).parent / "ledger_job.py"
# Every place once, each in a process of its own: the run goes on from wherever the one before left it.
PLACES = [
    ["opened", 0], ["in train_step", 1], ["in the row", 3], ["after the row", 5], ["opened", 0],
    ["before the mark", 6], ["after the mark", 6], ["in train_step", 8], ["after the checkpoint", 8],
    ["in the row", 10], ["after the row", 11], ["after the end", 12],
]  # fmt: skip
BY_ITERATION = {
    "unit": "ITERATION",
    "options": {"total_steps": 12, "valid_frequency": 3, "chkpt_frequency": 2},
}
BY_EPOCH = {"unit": "EPOCH", "options": {"total_steps": 4, "valid_frequency": 2, "chkpt_frequency": 1}}


def chain(base, kills, data=None, options=None, **others):
    base = {**base, "options": {**base["options"], **(options or {})}}
    return {**base, "data": {"train": 3, **(data or {})}, "kills": kills, **others}


CHAINS = {
    "iteration": chain(BY_ITERATION, PLACES),
    "iteration-workers": chain(BY_ITERATION, PLACES[3:8], {"num_workers": 2}),
    "iteration-async": chain(BY_ITERATION, PLACES, options={"async_chkpt": True}),
    "iteration-accumulating": chain(
        BY_ITERATION, PLACES[4:], options={"total_steps": 6, "accumulation_steps": 2, "chkpt_frequency": 1}
    ),
    "epoch": chain(BY_EPOCH, PLACES),
    "epoch-workers": chain(BY_EPOCH, PLACES[2:7], {"num_workers": 2}),
    "uncut": chain(BY_ITERATION, [["after the row", 3]], uncut=True),
    "limited": chain(BY_ITERATION, [], limited=True, options={"chkpt_frequency": None}),
}  # fmt: skip


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """The folder of all chains, and beside each one a run of the same settings that nothing interrupts."""
    root = tmp_path_factory.mktemp("chains")
    whole = {
        f"{name}-whole": {**c, "kills": [], "limited": False, "uncut": False} for name, c in CHAINS.items()
    }
    done = subprocess.run(
        [sys.executable, JOB, root, json.dumps(CHAINS | whole)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return root, json.loads((root / "ends.json").read_text()), done.stderr


@pytest.mark.parametrize("name", [name for name in CHAINS if name not in ("uncut", "limited")])
def test_every_step_once_whatever_kills_the_run(chains, name):
    root, ends, errors = chains
    kills = CHAINS[name]["kills"]
    assert ends[name] == [-signal.SIGKILL] * len(kills) + [0], errors
    whole = (root / f"{name}-whole" / "ledger.jsonl").read_bytes()
    assert (root / name / "ledger.jsonl").read_bytes() == whole
    assert [row["step"] for row in rows_of(root / name / "ledger.jsonl")] == [*range(1, 13), 12]
    for number, (place, _) in enumerate(kills):  # and at no time was there a step twice, or another one
        left = (root / name / f"after-{number}.jsonl").read_bytes()
        assert whole.startswith(left)
        assert left.endswith(b"\n") is (place != "in the row")


def test_control_without_the_cut_steps_would_be_there_twice(chains):
    root, ends, errors = chains
    assert ends["uncut"] == [-signal.SIGKILL, 0], errors
    lines = (root / "uncut" / "ledger.jsonl").read_bytes().splitlines()
    whole = (root / "uncut-whole" / "ledger.jsonl").read_bytes().splitlines()
    assert len(lines) == len(whole) + 1 and set(lines) == set(whole)


def test_a_full_disk_delays_rows_but_loses_none(chains):
    root, ends, errors = chains
    assert ends["limited"] == [0], errors
    whole = (root / "limited-whole" / "ledger.jsonl").read_bytes()
    assert len(whole) > 2400
    assert (root / "limited" / "ledger.jsonl").read_bytes() == whole
    assert errors.count("could not be written, training goes on and the rows wait: OSError") == 1


def rows_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()[1:]]


def run(kit, path, *, net=None, data=None, root=None, weights_every=1, ledger=None, **options):
    """Fit new objects, with a ledger at the path if there is one; return model and trainer."""
    options = {
        "unit": kit.ITERATION,
        "total_steps": 8,
        "chkpt_frequency": root and 2,
        "chkpt_root": root,
        **options,
    }
    trainer = kit.trainer(**options)
    if path is not None:
        trainer.plugins.append(ledger or Ledger(path, weights_every))
    model = net or kit.Net()
    torch.rand(3), random.random()  # foreign draws do not matter
    try:
        model.finished = trainer.fit(model, data or kit.Data())
    except kit.AbortError:
        model.finished = False
    model.end = kit.end_of(model)
    return model


def call_of_step(kit, step):
    """The number of the call of train_step for a step, for a Net to abort at."""
    trace = run(kit, None).trace
    return next(i for i, call in enumerate(trace) if call[0] == "train_step" and call[1][1] == step)


@pytest.fixture
def ledger_of(kit, tmp_path):
    """Run with a ledger of the given name, and return its path."""

    def make(name, **options):
        run(kit, tmp_path / name, **options)
        return tmp_path / name

    return make


def test_the_run_ends_with_the_same_bits(kit, tmp_path):
    options = {"valid_frequency": 3, "unit": kit.EPOCH, "total_steps": 3}
    plain = run(kit, None, root=tmp_path / "a", **options)
    watched = run(kit, tmp_path / "ledger", root=tmp_path / "b", **options)
    assert watched.end == plain.end and watched.batches == plain.batches and watched.trace == plain.trace


@pytest.mark.parametrize("unit", ["EPOCH", "ITERATION"])
def test_a_run_that_is_asked_to_stop(kit, tmp_path, unit):
    class Stopping(kit.Net):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            if state.global_iteration == 4:
                self.trainer.request_stop()

    options = {
        "unit": getattr(kit, unit),
        "total_steps": 9 if unit == "ITERATION" else 3,
        "chkpt_frequency": 5,
    }
    whole, path = tmp_path / "whole", tmp_path / "ledger"
    run(kit, whole, root=tmp_path / "a", **options)
    assert not run(kit, path, net=Stopping(), root=tmp_path / "b", **options).finished
    assert whole.read_bytes().startswith(path.read_bytes()) and len(rows_of(path)) == 4
    assert run(kit, path, root=tmp_path / "b", **options).finished
    assert path.read_bytes() == whole.read_bytes()


def test_a_finished_run_is_left_alone_and_one_that_is_given_more_goes_on(kit, tmp_path):
    whole, path = tmp_path / "whole", tmp_path / "ledger"
    options = {"unit": kit.EPOCH, "root": tmp_path / "b"}
    run(kit, whole, unit=kit.EPOCH, root=tmp_path / "a", total_steps=4)
    run(kit, path, **options, total_steps=2)
    two = path.read_bytes()
    assert json.loads(two.splitlines()[-1])["end"]
    again = run(kit, path, **options, total_steps=2)
    again.trainer.test(again, kit.Data())
    assert path.read_bytes() == two
    run(kit, path, **options, total_steps=4)
    assert path.read_bytes() == whole.read_bytes()  # the end is where it would have been


def test_one_object_for_several_runs(kit, tmp_path):
    path = tmp_path / "ledger"
    ledger = Ledger(path, 1)
    run(kit, path, ledger=ledger, root=tmp_path / "a", total_steps=4)
    run(kit, path, ledger=ledger, root=tmp_path / "a", total_steps=4)  # only loads its state
    run(kit, path, ledger=ledger, root=tmp_path / "b", total_steps=6)
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3, 4, 5, 6, 6]


def test_rows_that_wait_are_in_the_checkpoint(kit, tmp_path, monkeypatch):
    whole, path = tmp_path / "whole", tmp_path / "ledger"
    run(kit, whole, root=tmp_path / "a")
    write = os.write

    def full(descriptor, content):
        if content.startswith(b'{"step"') and json.loads(content.splitlines()[0])["step"] >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", full)
    assert not run(kit, path, net=kit.Net(abort_at=call_of_step(kit, 6)), root=tmp_path / "b").finished
    assert len(rows_of(path)) == 2
    # A run that would end with rows that wait does not end: it can be started again.
    with pytest.raises(RuntimeError, match="No space left"):
        run(kit, path, root=tmp_path / "b")
    monkeypatch.undo()
    assert run(kit, path, root=tmp_path / "b").finished
    assert path.read_bytes() == whole.read_bytes()


def test_a_rehearsal_writes_nothing(kit, tmp_path):
    path = tmp_path / "folder" / "ledger"
    run(kit, path, dry_run=2)
    assert not path.parent.exists()


def test_a_stream_has_no_ids(kit, tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.arange(12.0).reshape(6, 2))

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    class StreamData(kit.DataModule):
        def setup(self):
            self._train_dataset = self._create_dataset(Stream(), {"batch_size": 2})

    class Plain(kit.Net):
        def train_step(self, batch, state):
            self._loss_items["loss"] = batch.sum()

    run(kit, tmp_path / "ledger", net=Plain(), data=StreamData(), total_steps=3)
    assert [row.get("ids") for row in rows_of(tmp_path / "ledger")] == [None] * 4


def test_losses_are_numbers_where_they_can_be(kit, tmp_path):
    class Losing(kit.Net):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            self._loss_items |= {
                "n": 3,
                "nan": torch.tensor(float("nan")),
                "inf": -np.inf,
                "np": np.float32(0.5),
            }
            self._loss_items["each"] = torch.ones(2)

        def on_training_batch_end(self, state, should_log=False):
            pass

    run(kit, tmp_path / "ledger", net=Losing(), total_steps=1)
    losses = rows_of(tmp_path / "ledger")[0]["losses"]
    assert isinstance(losses.pop("loss"), float)
    assert losses == {"n": 3, "nan": "nan", "inf": "-inf", "np": 0.5, "each": digest(torch.ones(2))}


def test_every_tensor_is_named_once_also_what_no_state_dict_has(kit, tmp_path):
    class Unusual(kit.Net):
        def setup(self, fast_init=False):
            super().setup()
            self.net.register_buffer("count", torch.zeros(()), persistent=False)
            self.heads = {"lazy": torch.nn.LazyLinear(2), "tied": self.net[0]}
            self.alone = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

        def train_step(self, batch, state):
            super().train_step(batch, state)
            self.heads["lazy"](batch[0])

    run(kit, tmp_path / "ledger", net=Unusual(), total_steps=2)
    first, second, _ = rows_of(tmp_path / "ledger")
    usual = {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias", "net.count", "alone.0.0"}
    assert set(first["weights"]) == usual
    assert set(second["weights"]) == usual | {"heads.lazy.weight", "heads.lazy.bias"}
    assert {"optimizer.param_groups", "alone.param_groups", "optimizer.net.2.bias"} < set(
        second["optimizers"]
    )


# What the diff says.


def printed(capsys, *arguments):
    capsys.readouterr()  # what the runs logged
    status = main(["diff", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, (captured.out or captured.err).splitlines()


def test_equal(ledger_of, capsys):
    status, lines = printed(capsys, ledger_of("a"), ledger_of("b"))
    assert status == 0
    assert lines == ["equal", "  equal through step 8, from step 1 on; weights compared last at step 8"]


def test_another_seed(ledger_of, capsys):
    status, lines = printed(capsys, ledger_of("a"), ledger_of("b", random_seed=1))
    assert status == 1
    assert lines[0].startswith("part at step 1, epoch 1: rng.torch ")
    assert "  begun with another random_seed 6691 in A, 1 in B" in lines


def test_another_order(kit, ledger_of, capsys):
    status, lines = printed(capsys, ledger_of("a"), ledger_of("b", data=kit.Data(random_seed=1)))
    assert status == 1 and lines[0].startswith("part at step 1, epoch 1: ids ")


def test_control_numpys_legacy_generator_parts_in_the_batch(kit, ledger_of, tmp_path, capsys):
    """It is neither seeded nor saved: a dataset that draws from it for one sample differs where that sample comes."""

    class Drawing(kit.Points):
        def __getitem__(self, index):
            x, index = super().__getitem__(index)
            return (x + np.random.rand() if index == 5 else x), index  # noqa: NPY002

    class DrawingData(kit.Data):
        def setup(self):
            self._train_dataset = self._create_dataset(Drawing(24), {"batch_size": 2, "shuffle": True})

    model = run(kit, tmp_path / "a", data=DrawingData(train=12), total_steps=12)
    step = 1 + next(i for i, (ids, _) in enumerate(model.batches) if 5 in ids)
    assert 1 < step < 12
    b = ledger_of("b", data=DrawingData(train=12), total_steps=12)
    status, lines = printed(capsys, tmp_path / "a", b)
    assert status == 1
    rows = [rows_of(path)[step - 1] for path in (tmp_path / "a", b)]
    assert lines[0] == f"part at step {step}, epoch 1: batch {rows[0]['batch']} in A, {rows[1]['batch']} in B"
    assert lines[1].startswith("  also losses.loss ")
    assert (
        f"  equal through step {step - 1}, from step 1 on; weights compared last at step {step - 1}" in lines
    )
    assert any("numpy.random" in line for line in lines)


@pytest.mark.parametrize(
    ("forgotten", "first"), [("optimizer", "optimizers.optimizer."), ("net", "weights.net.0.weight")]
)
def test_control_a_forgotten_piece_of_state_is_named(kit, tmp_path, capsys, forgotten, first):
    class Forgetful(kit.Net):
        def load_state_dict(self, state, fast_init=False):
            super().load_state_dict({**state, forgotten: getattr(self, forgotten).state_dict()})

    run(kit, tmp_path / "a", root=tmp_path / "one")
    run(kit, tmp_path / "b", net=kit.Net(abort_at=call_of_step(kit, 6)), root=tmp_path / "two")
    assert run(kit, tmp_path / "b", net=Forgetful(), root=tmp_path / "two").finished
    status, lines = printed(capsys, tmp_path / "a", tmp_path / "b")
    assert status == 1
    # The checkpoint is of step 4: step 5 found something else than the run that was never interrupted.
    assert lines[0].startswith(f"part at step 5, epoch 2: {first}")
    assert any("state_dict lacks" in line for line in lines)


def test_a_single_parameter_is_named(kit, ledger_of, capsys):
    class Nudged(kit.Net):
        def on_training_batch_end(self, state, should_log=False):
            super().on_training_batch_end(state, should_log)
            if state.global_iteration == 4:
                with torch.no_grad():
                    self.net[2].bias += 2**-20

    a, b = ledger_of("a"), ledger_of("b", net=Nudged())
    parting = diff(a, b).parting
    assert (parting.step, parting.is_end) == (5, False)
    assert [d.component for d in parting.differences] == ["weights.net.2.bias", "losses.loss"]
    # With digests of weights further apart it is seen in the loss, and said when they were compared last.
    sparse = [ledger_of("c", weights_every=3), ledger_of("d", weights_every=3, net=Nudged())]
    status, lines = printed(capsys, *sparse)
    assert status == 1 and lines[0].startswith("part at step 5, epoch 2: losses.loss ")
    assert lines[1] == "  equal through step 4, from step 1 on; weights compared last at step 4"
    assert diff(a, sparse[0]).parting is None  # what only one has is not compared


def test_the_end_is_compared(kit, ledger_of, capsys):
    class Nudged(kit.Net):
        def on_training_batch_end(self, state, should_log=False):
            super().on_training_batch_end(state, should_log)
            if state.global_iteration == 8:
                torch.rand(1)

    status, lines = printed(capsys, ledger_of("a"), ledger_of("b", net=Nudged()))
    assert status == 1 and lines[0].startswith("part at the end, after step 8, epoch 3: rng.torch ")


def test_a_run_that_is_shorter(ledger_of, tmp_path, capsys):
    a, b = ledger_of("a"), ledger_of("b", total_steps=5)
    status, lines = printed(capsys, a, b)
    assert status == 3
    assert lines == [
        "equal as far as both go: B ends at step 5, the other at step 8, where it finished",
        "  equal through step 5, from step 1 on; weights compared last at step 5",
    ]
    torn = tmp_path / "torn"
    torn.write_bytes(a.read_bytes()[:-10])
    status, lines = printed(capsys, torn, a)
    assert status == 3 and lines[0].endswith("A ends at step 8, the other at step 8, where it finished")


def test_a_ledger_that_begins_later(kit, ledger_of, tmp_path, capsys):
    """One that joins a run in progress has its steps from there on."""
    assert not run(kit, None, net=kit.Net(abort_at=call_of_step(kit, 6)), root=tmp_path / "c").finished
    b = ledger_of("b", root=tmp_path / "c", total_steps=8, accept_on_resume=["ledger"])
    status, lines = printed(capsys, ledger_of("a"), b)
    assert status == 3
    assert lines[0] == "equal as far as both go: B begins at step 5"
    assert lines[1] == "  equal through step 8, from step 5 on; weights compared last at step 8"
    status, lines = printed(capsys, ledger_of("d", total_steps=3), b)
    assert status == 2 and "ends before step 5, the first of the other" in lines[0]


def test_json(ledger_of, capsys):
    a, b = ledger_of("a"), ledger_of("b", total_steps=5)
    status, lines = printed(capsys, a, b, "--json")
    found = json.loads("\n".join(lines))
    assert (status, found["status"], found["equal_through"], found["parting"]) == (3, "shorter", 5, None)
    assert found["b"] == {"run": "net", "first": 1, "last": 5, "is_finished": True}
    status, lines = printed(capsys, a, ledger_of("c", random_seed=1), "--json")
    found = json.loads("\n".join(lines))
    assert (status, found["status"], found["parting"]["step"], found["equal_through"]) == (1, "part", 1, None)
    assert found["parting"]["differences"][0]["component"] == "rng.torch"


def test_the_module_is_a_command(ledger_of):
    command = [sys.executable, "-W", "error", "-m", "helios.trainer.ledger", "diff", ledger_of("a")]
    done = subprocess.run(
        [*command, ledger_of("b", random_seed=1)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stdout.startswith("part at step 1") and not done.stderr


# Files that are not what they should be.


def tampered(lines, change):
    if change == "cut":
        return lines[:2]
    if change == "another number":
        return [*lines[:2], lines[2].replace(b'"loss":0', b'"loss":1'), *lines[3:]]
    return [lines[0].replace(b'"net"', b'"ten"'), *lines[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "is missing, the ledger that this run has written to. Put it back; or"),
        ("cut", "bytes, but had .* when the checkpoint was written"),
        ("another number", "is not the ledger that this run has written to, or was changed"),
        ("another run", "is not the ledger that this run has written to, or was changed"),
    ],
)
def test_a_file_that_is_not_the_checkpoints_is_refused_and_left_alone(kit, tmp_path, change, message):
    path = tmp_path / "ledger"
    run(kit, path, root=tmp_path / "c", total_steps=4)
    lines = path.read_bytes().splitlines(keepends=True)
    path.unlink()
    if change != "missing":
        path.write_bytes(b"".join(tampered(lines, change)))
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(RuntimeError, match=message) as caught:
        run(kit, path, root=tmp_path / "c", total_steps=8)
    assert isinstance(caught.value.__cause__, LedgerError)
    assert (path.read_bytes() if path.exists() else None) == before
    # The way out that the message names.
    other = tmp_path / "other"
    ledger = Ledger(other, 1, plug_id="ledger2")
    run(kit, other, ledger=ledger, root=tmp_path / "c", total_steps=8, accept_on_resume=["ledger2"])
    assert [row["step"] for row in rows_of(other)] == [5, 6, 7, 8, 8]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"notes\n", "is no ledger: its first line is not the header of one"),
        (
            b'{"helios_ledger":2,"run":"net","begun_with":{}}\n',
            "has format 2, this release of helios-trainer knows 1",
        ),
        (b'{"helios_ledger":1,"run":"other","begun_with":{}}\n', "is the ledger of the run 'other'"),
    ],
)
def test_what_a_run_has_not_begun_it_does_not_replace(kit, tmp_path, content, message):
    path = tmp_path / "ledger"
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=message):
        run(kit, path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("left", [b"", b'{"helios_ledger":1,"ru'])
def test_what_a_killed_beginning_left_is_replaced(kit, tmp_path, left):
    (tmp_path / "ledger").write_bytes(left)
    run(kit, tmp_path / "ledger")
    assert len(rows_of(tmp_path / "ledger")) == 9


HEADER = b'{"helios_ledger":1,"run":"net","begun_with":{}}\n'
ROW = b'{"step":1,"epoch":1}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "is no ledger"),
        (b"\x80\x81\n", "is no ledger"),
        (b"[1]\n", "is no ledger"),
        (b'{"helios_ledger":7}\n', "has format 7"),
        (b'{"helios_ledger":1}\n', "lacks 'run'"),
        (HEADER, "has no step yet"),
        (HEADER + b'{"step":1', "has no step yet"),
        (HEADER + ROW + b"junk\n", "line 3, is damaged: expected a row, found b'junk"),
        (HEADER + ROW + b'{"step":"2","epoch":1}\n', "line 3, is damaged"),
        (HEADER + ROW + ROW, "line 3, is damaged: step 1 after step 1"),
        (HEADER + ROW + b'{"step":3,"epoch":1}\n', "line 3, is damaged: step 3 after step 1"),
        (HEADER + ROW + b'{"step":1,"epoch":1,"end":true}\n' + ROW, "step 1 after the end at step 1"),
    ],
)
def test_files_that_cannot_be_compared(tmp_path, capsys, content, message):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(HEADER + ROW + b'{"step":2,"epoch":1}\n{"step":2,"epoch":1,"end":true}\n')
    if content is not None:
        bad.write_bytes(content)
    for pair in ((good, bad), (bad, good)):
        status, lines = printed(capsys, *pair)
        assert status == 2
        assert (
            len(lines) == 1
            and message in lines[0]
            and lines[0].startswith("python -m helios.trainer.ledger: ")
        )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"path": 3}, TypeError), ({"path": "a", "weights_every": 0}, ValueError),
        ({"path": "a", "weights_every": True}, TypeError), ({"path": "a", "weights_every": 2.0}, TypeError),
        ({"path": "a", "plug_id": "rng"}, ValueError),
    ],
)  # fmt: skip
def test_arguments(arguments, error):
    with pytest.raises(error, match=list(arguments)[-1]):
        Ledger(**arguments)
