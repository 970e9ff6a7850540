"""helios.trainer.distributed in groups of real processes, spawned and of torchrun, and without a group."""

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import helios.trainer.distributed as hd

pytestmark = pytest.mark.long

JOB = Path(__file__).parent / "distributed_job.py"
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def job():
    spec = importlib.util.spec_from_file_location("distributed_job", JOB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in (*NAMES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def results(command, folder, size):
    done = subprocess.run([*command, folder], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)]


def same(found, expected):
    return found.dtype is expected.dtype and found.shape == expected.shape and torch.equal(found, expected)


def check(job, found, *, is_torchrun):
    size = len(found)
    inputs = [[tensor.detach() for tensor in job.inputs(rank)] for rank in range(size)]
    columns = list(zip(*inputs, strict=True))
    sums = [functools.reduce(torch.add, column) for column in columns]
    for rank, result in enumerate(found):
        assert result["info"] == [rank, rank, size, size] == [*result["getters"][:2], *result["getters"][2:]]
        assert result["is active"] is True and result["is torchrun"] is is_torchrun
        for gathered, column in zip(result["gathered"], columns, strict=True):
            assert same(gathered, torch.stack(column)) and not gathered.requires_grad
        first = torch.cat([rows[0] for rows in inputs])
        assert same(result["in a row"], first.reshape(-1)) and same(result["behind"], first)
        assert result["bools"].tolist() == [[True], [True]] + [[True], [False]] * (size - 1)
        for key in ("list", "separately"):
            for total, expected in zip(result[key], sums, strict=True):
                assert same(total, expected) and not total.requires_grad
        assert all(map(same, result["tuple"], sums[:2])) and isinstance(result["tuple"], list)
        assert result["empty"] == []
        for key, combine in (("max", torch.maximum), ("min", torch.minimum), ("product", torch.mul)):
            assert same(result[key], functools.reduce(combine, columns[0]))
        assert same(result["in pieces"], size * torch.arange(7.0) + sum(range(size)))
        assert result["unchanged"]
        expected = {0: ["a-1\n", "", "c\n", ""], 1: ["", "b", "", "d\n"]}
        assert result["printed"] == expected.get(rank, [""] * 4)
        texts = result["refused"]
        elements = f"{size} (ranks) * 6 (elements of a tensor of shape (2, 3)) elements, found ({size}, 2)"
        assert texts["size"] == f"ValueError: size must have {elements}, which has {size * 2}"
        assert texts["gather a list"] == "TypeError: tensor must be a tensor, found list [1]"
        assert texts["reduce a number"] == "TypeError: tensors[1] must be a tensor, found int 3"
        assert texts["bool"].startswith("TypeError: tensors must not be of bool")
        assert texts["op"].startswith("ValueError: op must be SUM, PRODUCT, MIN or MAX")
        assert texts["init"].startswith(
            "RuntimeError: a group of processes is active already: call shutdown_dist()"
        )
    return sums


def test_spawned_groups(job, tmp_path):
    command = [sys.executable, "-W", "error", JOB, tmp_path, "2", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    for size in (2, 4):
        found = [torch.load(tmp_path / f"{size}-{rank}.pt") for rank in range(size)]
        sums = check(job, found, is_torchrun=False)
    # The control: with four ranks, the bits of torch's own sum depend on what it is summed together with.
    assert not torch.equal(found[0]["by torch"][0], sums[0])


def test_a_group_of_torchrun(job, tmp_path):
    torchrun = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    ]
    check(job, results([*torchrun, JOB], tmp_path, 2), is_torchrun=True)


def test_without_a_group(capsys):
    assert not hd.is_dist_active() and not hd.is_using_torchrun()
    one = torch.ones(1)
    for name, arguments in [
        ("get_dist_info", ()), ("get_local_rank", ()), ("get_global_rank", ()), ("get_local_world_size", ()),
        ("get_world_size", ()), ("gather_into_tensor", (one, 1)), ("all_reduce_tensors", (one,)),
    ]:  # fmt: skip
        with pytest.raises(
            RuntimeError, match=f"^{name} needs a group of processes, and none is active: call it in"
        ):
            getattr(hd, name)(*arguments)
    hd.shutdown_dist()
    hd.safe_barrier()
    hd.global_print("x", 1, global_rank=5, sep="-")
    hd.local_print("y", local_rank=5)
    assert capsys.readouterr().out == "x-1\ny\n"


def test_all_that_is_public():
    assert set(hd.__all__) == {
        "DistributedInfo", "all_reduce_tensors", "gather_into_tensor", "get_dist_info", "get_global_rank",
        "get_local_rank", "get_local_world_size", "get_world_size", "global_print", "init_dist", "is_dist_active",
        "is_using_torchrun", "local_print", "safe_barrier", "shutdown_dist",
    }  # fmt: skip


GOOD = dict(zip(NAMES, ("0", "1", "0", "1", "localhost", "0"), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "1"}, r"RANK must be a whole number, 0 or more and less than 1 \(WORLD_SIZE\), found '1'"),
        ({"RANK": "x"}, "RANK must be a whole number, .* found 'x'"),
        ({"RANK": "-1"}, "RANK must be a whole number, .* found '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number, 1 or more, found '0'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, 1 or more, found 'two'"),
        (
            {"LOCAL_WORLD_SIZE": "2"},
            r"LOCAL_WORLD_SIZE must be .* less than 2 \(WORLD_SIZE \+ 1\), found '2'",
        ),
        ({"LOCAL_RANK": "1"}, r"LOCAL_RANK must be .* less than 1 \(LOCAL_WORLD_SIZE\), found '1'"),
        (
            {"MASTER_PORT": "70000"},
            "MASTER_PORT must be a whole number, 0 or more and less than 65536 .*'70000'",
        ),
        ({"MASTER_ADDR": ""}, "torchrun sets .*, and MASTER_ADDR is not set here"),
    ],
)
def test_an_environment_that_contradicts_itself(monkeypatch, changes, message):
    for name, value in {**GOOD, **changes}.items():
        monkeypatch.setenv(name, value)
    assert hd.is_using_torchrun()
    with pytest.raises(ValueError, match=message):
        hd.init_dist()
    assert not hd.is_dist_active()


@pytest.mark.parametrize("missing", NAMES)
def test_a_part_of_the_environment_is_not_torchrun(monkeypatch, missing):
    for name in set(NAMES) - {missing}:
        monkeypatch.setenv(name, GOOD[name])
    assert not hd.is_using_torchrun()
    with pytest.raises(
        RuntimeError, match="nothing says which process this is: start the script with torchrun"
    ):
        hd.init_dist()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # torchrun says that it was
    with pytest.raises(ValueError, match=f"torchrun sets .*, and {missing} is not set here"):
        hd.init_dist()


def test_init_dist_with_a_part_of_its_arguments():
    with pytest.raises(
        ValueError, match="rank=0, world_size=None, store=None belong together: give all three"
    ):
        hd.init_dist(rank=0)


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "1", True])
def test_init_dist_with_a_timeout_that_is_none(value):
    with pytest.raises((TypeError, ValueError), match="timeout_s must be"):
        hd.init_dist(timeout_s=value)


PORT_IN_USE = """
import os, socket
from helios.trainer.distributed import init_dist

with socket.create_server(("", 0)) as taken:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="localhost")
    os.environ["MASTER_PORT"] = str(taken.getsockname()[1])
    try:
        init_dist()
    except RuntimeError as error:
        print(error)
"""


def test_a_port_that_is_in_use(python):
    text = python(PORT_IN_USE)
    assert text.startswith("MASTER_PORT=") and " of MASTER_ADDR=localhost is in use" in text
    assert "--master-port" in text


def test_a_group_of_one():
    store = torch.distributed.HashStore()
    hd.init_dist(backend="gloo", rank=0, world_size=1, store=store, timeout_s=30)
    try:
        assert hd.get_dist_info() == hd.DistributedInfo(0, 0, 1, 1)
        assert hd.all_reduce_tensors(torch.ones(2)).tolist() == [1, 1]
        assert hd.gather_into_tensor(torch.tensor(3), 1).tolist() == [3]
        hd.safe_barrier()
    finally:
        hd.shutdown_dist(has_failed=True)
    assert not hd.is_dist_active()
