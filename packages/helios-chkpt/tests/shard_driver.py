"""Processes that save and load sharded checkpoints together: imports torch once, then forks the ranks of each step.

    python shard_driver.py FOLDER STEP ...        # a STEP is <function>:<number of ranks>[:<argument>]

Each step is a function of this module, called in every rank of a new process group. Prints a line of JSON for each
step: what each rank returned, or the text of its exception, or the number of the signal that ended it.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
warnings.simplefilter("error")

import chkpt_kit as kit  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.filesystem import FileSystem  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor  # noqa: E402

from helios import chkpt  # noqa: E402
from helios.chkpt._sharded import read, write  # noqa: E402, F401  # imported before any fork, since it takes a while
from helios.chkpt._sharded.folder import delete  # noqa: E402

NAME = "run_epoch_1_iter_2.dcp"
_SPECS: dict[str, tuple[tuple[int, ...], list[Any], torch.dtype]] = {
    "even": ((8, 3), [Shard(0)], torch.float32),
    "uneven": ((7, 3), [Shard(0)], torch.float32),
    "fewer_rows_than_ranks": ((3, 5), [Shard(0)], torch.float32),
    "one": ((1,), [Shard(0)], torch.float64),
    "empty": ((0, 4), [Shard(0)], torch.float32),
    "columns": ((4, 5), [Shard(1)], torch.float32),
    "everywhere": ((4, 5), [Replicate()], torch.int64),
    "scalar": ((), [Replicate()], torch.float32),
    "bf16": ((6, 2), [Shard(0)], torch.bfloat16),
    "f8": ((6, 2), [Shard(0)], torch.float8_e4m3fn),
    "flags": ((6, 2), [Shard(0)], torch.bool),
    "complex": ((6, 2), [Shard(0)], torch.complex64),
    "large": ((70, 1000), [Shard(0)], torch.float32),  # more than is written in one piece with others
}
_GRIDS = {
    "grid_hybrid": [Replicate(), Shard(0)],
    "grid_both": [Shard(0), Shard(1)],
    "grid_nested": [Shard(0), Shard(0)],
}


def whole(seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of the state, whole; other ones for each seed."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (shape, _, dtype) in _SPECS.items():
        found[name] = (torch.randn(shape, generator=generator) * 50).to(dtype)
    return found


def grids() -> dict[str, torch.Tensor]:
    """Tensors that are spread over meshes of two dims."""
    return {name: torch.arange(35.0).view(5, 7) + number for number, name in enumerate(_GRIDS)}


def state_on(mesh: DeviceMesh, seed: int = 0) -> dict[str, Any]:
    """A state of DTensors, nested and tied, and of plain values."""
    parts = {
        name: distribute_tensor(tensor, mesh, _SPECS[name][1], src_data_rank=None)
        for name, tensor in whole(seed).items()
    }
    tied = torch.nn.Parameter(parts["fewer_rows_than_ranks"])  # another object over the same memory
    shared = {"w": parts["even"]}
    twice = (parts["columns"], "x")
    return {
        "model": {"net": parts, "tied": tied, 3: [1, (2, parts["uneven"], {"deep": parts["one"]})]},
        "optimizer": {"a": shared, "b": shared, "c": [twice, twice]},
        "plain": {"w": torch.arange(5.0), "n": seed},
    }


def plain_of(seed: int = 0) -> dict[str, Any]:
    """What `load` is to make of `state_on`."""
    parts = whole(seed)
    shared = {"w": parts["even"]}
    twice = (parts["columns"], "x")
    return {
        "model": {
            "net": parts,
            "tied": parts["fewer_rows_than_ranks"],
            3: [1, (2, parts["uneven"], {"deep": parts["one"]})],
        },
        "optimizer": {"a": shared, "b": shared, "c": [twice, (parts["columns"], "x")]},
        "plain": {"w": torch.arange(5.0), "n": seed},
        "version": chkpt.__version__,
    }


def line() -> DeviceMesh:
    """All ranks in one dim."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))


def raw(tensor: torch.Tensor) -> bytes:
    """The bits of the elements."""
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and raw(a) == raw(b)


# Steps


def save(folder: Path, seed: str) -> str:
    return str(chkpt.save_sharded(state_on(line(), int(seed)), folder / NAME))


def load(folder: Path, seed: str) -> list[str]:
    """Compare each shard with what this rank would have of the state; return what is wrong."""
    mesh = line()
    expected = state_on(mesh, int(seed))
    loaded: Any = chkpt.load_sharded(folder / NAME, meshes=[mesh])
    wrong = []
    for name, tensor in expected["model"]["net"].items():
        found = loaded["model"]["net"][name]
        if (
            type(found) is not DTensor
            or found.device_mesh is not mesh
            or found.placements != tensor.placements
        ):
            wrong.append(f"{name}: {found}")
        elif found.shape != tensor.shape or not equal(found.to_local(), tensor.to_local()):
            wrong.append(f"{name}: {found.to_local()} for {tensor.to_local()}")
    net = loaded["model"]["net"]
    pairs = [
        (loaded["model"]["tied"], net["fewer_rows_than_ranks"]),
        (loaded["model"][3][1][1], net["uneven"]),
        (loaded["model"][3][1][2]["deep"], net["one"]),
        (loaded["optimizer"]["a"]["w"], net["even"]),
        (loaded["optimizer"]["c"][0][0], net["columns"]),
        (loaded["optimizer"]["c"][1][0], net["columns"]),
        (loaded["optimizer"]["a"], loaded["optimizer"]["b"]),
    ]
    wrong += [f"not tied: {number}" for number, (a, b) in enumerate(pairs) if a is not b]
    if not kit.same(loaded["plain"], expected["plain"]) or loaded["version"] != chkpt.__version__:
        wrong.append(f"{loaded['plain']}, {loaded['version']}")
    if list(loaded) != ["model", "optimizer", "plain", "version"]:
        wrong.append(str(list(loaded)))
    return wrong


def load_without_mesh(folder: Path, seed: str) -> bool:
    """No mesh that fits: plain whole tensors in every rank."""
    net = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("a", "b"))
    loaded = chkpt.load_sharded(folder / NAME, meshes=[net], verify=False)
    return is_whole(loaded, int(seed))


def is_whole(loaded: Any, seed: int) -> bool:
    expected = plain_of(seed)
    names = [all(equal(loaded["model"]["net"][n], t) for n, t in expected["model"]["net"].items())]
    return all(names) and kit.same(loaded["plain"], expected["plain"]) and list(loaded) == list(expected)


def plain_dcp_load(folder: Path, seed: str) -> list[str]:
    """What torch alone makes of the folder of shards."""
    (shards,) = (folder / NAME).glob("shards-*")
    mesh = line()
    expected = state_on(mesh, int(seed))["model"]["net"]
    loaded = {"model": {"net": {name: torch.zeros_like(tensor) for name, tensor in expected.items()}}}
    dcp.load(loaded, checkpoint_id=shards)
    pairs = [(name, loaded["model"]["net"][name].to_local(), t.to_local()) for name, t in expected.items()]
    return [name for name, found, tensor in pairs if not equal(found, tensor)]


def save_grid(folder: Path, _: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    state = {
        name: distribute_tensor(tensor, mesh, _GRIDS[name], src_data_rank=None)
        for name, tensor in grids().items()
    }
    chkpt.save_sharded({"model": state}, folder / "grid.dcp")


def load_grid(folder: Path, _: str) -> list[str]:
    """On two meshes that fit: that with the same names is taken."""
    world = dist.get_world_size()
    meshes = [
        line(),
        init_device_mesh("cpu", (1, world), mesh_dim_names=("other", "names")),
        init_device_mesh("cpu", (world, 1), mesh_dim_names=("outer", "inner")),
    ]
    loaded: Any = chkpt.load_sharded(folder / "grid.dcp", meshes=meshes)
    wrong = []
    for name, tensor in grids().items():
        found = loaded["model"][name]
        expected = distribute_tensor(tensor, meshes[2], _GRIDS[name], src_data_rank=None)
        if found.device_mesh is not meshes[2] or list(found.placements) != _GRIDS[name]:
            wrong.append(f"{name}: {found.device_mesh}")
        if not equal(found.to_local(), expected.to_local()):
            wrong.append(name)
    return wrong


def load_file(folder: Path, _: str) -> bool:
    """A plain file, by every rank."""
    if dist.get_rank() == 0:
        chkpt.save({"x": torch.arange(3)}, folder / "plain.pth")
    dist.barrier()
    loaded = chkpt.load_sharded(folder / "plain.pth", meshes=[])
    return kit.same(loaded, {"x": torch.arange(3), "version": chkpt.__version__})


def subgroup(folder: Path, _: str) -> str:
    """Only some of the processes."""
    group = dist.new_group([1, 2])
    if dist.get_rank() not in (1, 2):
        return raised(lambda: chkpt.save_sharded({}, folder / "sub.dcp", group=group))
    mesh = DeviceMesh("cpu", [1, 2])
    tensor = distribute_tensor(torch.arange(5.0), mesh, [Shard(0)], src_data_rank=None)
    chkpt.save_sharded({"x": tensor}, folder / "sub.dcp", group=group)
    loaded: Any = chkpt.load_sharded(folder / "sub.dcp", meshes=[mesh], group=group)
    return str(loaded["x"].to_local().tolist())


def fsdp(folder: Path, _: str) -> list[str]:
    """A model and its optimizer under FSDP2: saved, trained on, and put back."""

    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, torch.optim.AdamW(model.parameters())

    def trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
        for step in range(steps):
            model(torch.full((2, 5), float(step))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().to_local().clone() for p in model.parameters()]  # type: ignore[attr-defined]

    mesh = line()
    model, optimizer = made()
    trained(model, optimizer, 2)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    chkpt.check_state(state, sharded=True)
    chkpt.save_sharded(state, folder / "fsdp.dcp")
    expected = trained(model, optimizer, 3)
    model, optimizer = made()
    loaded: Any = chkpt.load_sharded(folder / "fsdp.dcp", meshes=[mesh])
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    found = trained(model, optimizer, 3)
    return [f"{a} for {b}" for a, b in zip(found, expected, strict=True) if not equal(a, b)]


def raised(work: Callable[[], object]) -> str:
    try:
        work()
    except Exception as error:
        number = f"[{error.errno}] " if isinstance(error, OSError) else ""
        return f"{type(error).__name__}: {number}{error}"
    return "nothing was raised"


def bad_states(folder: Path, _: str) -> list[str]:
    """What is raised in this rank if the state of rank 1 is bad, or its arguments are."""
    mesh, is_bad = line(), dist.get_rank() == 1
    path = folder / NAME
    good = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)], src_data_rank=None)
    partial = DTensor.from_local(torch.zeros(2), mesh, [Partial()], run_check=False)
    other = distribute_tensor(torch.arange(6.0), mesh, [Shard(0)], src_data_rank=None)
    states: list[dict[str, object]] = [
        {"a": {"b": {1, 2} if is_bad else 0}},
        {"a": [partial if is_bad else good]},
        {"a": [good if is_bad else other]},
        {"a": good, "b": 0 if is_bad else good},
        {"sharded" if is_bad else "s": 1},
    ]
    errors = [raised(lambda state=state: chkpt.save_sharded(state, path)) for state in states]  # type: ignore[misc]
    errors.append(raised(lambda: chkpt.save_sharded({}, folder / ("b.dcp" if is_bad else "a.dcp"))))
    errors.append(raised(lambda: chkpt.save_sharded({}, folder / ("a.pth" if is_bad else "a.dcp"))))
    errors.append(raised(lambda: chkpt.save_sharded({}, folder / "missing" / "a.dcp")))
    errors.append(raised(lambda: chkpt.load_sharded(path, meshes=[1] if is_bad else [])))  # type: ignore[list-item]
    return errors


def full_disk(folder: Path, rank: str) -> list[str]:
    """What is raised in this rank if there is no room for the shards of another one, in the end or from the start."""
    state = state_on(line(), 2)
    is_full = dist.get_rank() == int(rank)
    found = []
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        with calls(folder, kit.error(code), {"write": 1} if is_full else {}):
            found.append(raised(lambda: chkpt.save_sharded(state, folder / NAME)))
    if is_full:  # a real limit: the size of any file
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    found.append(raised(lambda: chkpt.save_sharded(state, folder / NAME)))
    if is_full:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    real = os.statvfs
    if dist.get_rank() == 0:
        os.statvfs = lambda path: _Full(real(path))  # type: ignore[assignment,misc]
    found.append(raised(lambda: chkpt.save_sharded(state, folder / NAME)))
    os.statvfs = real
    return found


class _Full:
    """A disk without room."""

    def __init__(self, real: Any) -> None:
        self.f_blocks, self.f_frsize, self.f_bfree = real.f_blocks, real.f_frsize, 1


def failing_calls(folder: Path, _: str) -> list[str]:
    """Every call of rank 0 that changes something fails; return what was then wrong, and how many calls there are."""
    mesh, is_first = line(), dist.get_rank() == 0
    state, wrong, number = state_on(mesh, 2), [], 0
    while True:
        counter = _Counter(folder, kit.error(errno.EIO), {"": number} if is_first else {})
        with counted(counter):
            error = raised(lambda: chkpt.save_sharded(state, folder / NAME))
        shared: list[Any] = [None, None]
        if is_first:
            shared = [counter.events, seed_of(chkpt.load(folder / NAME))]
            wrong += [
                f"call {number}, {counter.events[number:]}: {text}"
                for text in problems(counter, number, error, folder)
            ]
        dist.broadcast_object_list(shared, src=0)
        if len(shared[0]) <= number:  # no call of that number: nothing failed
            return [*wrong, f"{number} calls"]
        if shared[1] != 1:
            chkpt.save_sharded(state_on(mesh, 1), folder / NAME)
        number += 1


def problems(counter: _Counter, number: int, error: str, folder: Path) -> list[str]:
    """What is wrong after call `number` of a save failed."""
    failed = counter.events[number] if number < len(counter.events) else ""
    counts = "rename" in counter.events[:number]  # by then it may be the new one
    found, seed = [], seed_of(chkpt.load(folder / NAME))
    chkpt.verify(folder / NAME)
    if seed != 1 and not (counts and seed == 2):
        found.append(f"the state {seed}")
    # After the new one counts, only the order of what is on the disk may be in doubt: that is raised, nothing else.
    if not error.startswith("OSError") and not counts:
        found.append(error)
    entries = {path.name for path in (folder / NAME).iterdir()}
    if len(entries) != 2 and failed not in ("rmtree", "unlink"):
        found.append(f"left behind: {entries}")
    return found


def seed_of(loaded: Any) -> int | None:
    return next((seed for seed in (1, 2) if is_whole(loaded, seed)), None)


def store(folder: Path, _: str) -> dict[str, object]:
    """A run of checkpoints, some of one kind and some of the other, by a store in each rank."""
    rank, mesh = dist.get_rank(), line()
    root = folder / "run"
    found: dict[str, object] = {}
    if rank == 1:
        chkpt.CheckpointStore(folder / "unmade", "run", is_writer=False).close()
    dist.barrier()
    found["unmade"] = (folder / "unmade").exists()
    mine = chkpt.CheckpointStore(root, "run", 2, keep_best=1, is_writer=rank == 0)
    for iteration in range(1, 6):
        if iteration == 3 and rank == 0:
            mine.save({"x": iteration}, epoch=1, iteration=iteration)
        dist.barrier()
        if iteration != 3:
            score = 9.0 if iteration == 1 else 1.0
            path = mine.save_sharded(state_on(mesh, iteration), epoch=1, iteration=iteration, score=score)
            found["path"] = path.name
        dist.barrier()
    found["left"] = sorted(entry.name for entry in root.iterdir())
    found["list"] = [path.name for path in mine.list()]
    last = mine.last()
    found["last"] = None if last is None else last.name
    found["refused"] = raised(lambda: mine.save({}, epoch=9, iteration=9)) if rank else ""
    other = chkpt.CheckpointStore(root, "run", is_writer=rank == 1)
    found["wrong writer"] = raised(lambda: other.save_sharded({}, epoch=8, iteration=8))
    found["wrong number"] = raised(lambda: mine.save_sharded({}, epoch=8, iteration=-rank))
    mine.close()
    other.close()
    return found


def pruned(folder: Path, _: str) -> dict[str, object]:
    """A checkpoint is deleted while rank 1 verifies it and rank 0 may have done so already."""
    rank, real = dist.get_rank(), write.chunks_of
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("helios.chkpt").addHandler(handler)

    def deleting(path: Path, shards: Any) -> Any:
        delete(path)
        return real(path, shards)

    if rank == 1:
        write.chunks_of = deleting
    store = chkpt.CheckpointStore(folder / "pruned", "run", 1, is_writer=rank == 0)
    dist.barrier()
    path = store.save_sharded(state_on(line(), 1), epoch=1, iteration=1)
    return {"path": path.name, "there": path.exists(), "messages": messages}


def damaged(folder: Path, _: str) -> list[str]:
    """A bit of the file that another rank hashes is flipped: all say so."""
    path = folder / NAME
    errors = []
    for file in sorted(path.glob("shards-*/*")):
        dist.barrier()
        if dist.get_rank() == 0:
            flip(file, 100)
        dist.barrier()
        errors.append(raised(lambda: chkpt.load_sharded(path, meshes=[line()])))
        dist.barrier()
        if dist.get_rank() == 0:
            flip(file, 100)
    dist.barrier()
    chkpt.load_sharded(path, meshes=[line()])
    return errors


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 4]))


# Kills


class _Counter:
    """Calls that change something in a folder, counted; `action` at call `at[name]` of that name; `""` means all."""

    def __init__(self, folder: Path, action: Callable[[str], object], at: dict[str, int]) -> None:
        self.folder, self.action, self.at = folder, action, at
        self.events: list[str] = []

    def passes(self, name: str) -> None:
        numbers = {"": len(self.events), name: self.events.count(name)}
        self.events.append(name)
        if any(self.at.get(key) == number for key, number in numbers.items()):
            self.action(name)


@contextmanager
def counted(counter: _Counter) -> Iterator[None]:
    """Send the calls of this process through it."""
    root = str(counter.folder)

    def wrap(where: Any, name: str, label: str, is_ours: Callable[..., bool]) -> tuple[Any, str, Any]:
        real = getattr(where, name)

        def call(*args: Any, **options: Any) -> Any:
            if is_ours(*args):
                counter.passes(label)
            return real(*args, **options)

        setattr(where, name, call)
        return where, name, real

    def is_path(path: Any, *_: Any) -> bool:
        return isinstance(path, str | os.PathLike) and str(path).startswith(root)

    def is_new(path: Any, flags: int = 0, *_: Any) -> bool:
        return is_path(path) and bool(flags & os.O_CREAT)

    def is_open(descriptor: Any, *_: Any) -> bool:
        return Path(f"/proc/self/fd/{descriptor}").readlink().as_posix().startswith(root)

    changes = [
        wrap(os, "open", "open", is_new),
        wrap(os, "write", "write", is_open),
        wrap(os, "pwrite", "pwrite", is_open),
        wrap(os, "fsync", "fsync", is_open),
        wrap(fcntl, "flock", "flock", is_open),
        wrap(Path, "replace", "rename", is_path),
        wrap(Path, "mkdir", "mkdir", is_path),
        wrap(Path, "unlink", "unlink", is_path),
        wrap(shutil, "rmtree", "rmtree", is_path),
    ]
    try:
        yield
    finally:
        for where, name, real in changes:
            setattr(where, name, real)


def calls(folder: Path, action: Callable[[str], object], at: dict[str, int]) -> Any:
    return counted(_Counter(folder, action, at))


def count_calls(folder: Path, seed: str) -> list[str]:
    """The calls of a save over an older one, in this rank."""
    counter = _Counter(folder, kit.kill, {})
    with counted(counter):
        save(folder, seed)
    return counter.events


def killed_at(folder: Path, which: str) -> None:
    """A save over an older one in which a rank is killed before one of its calls: <seed>,<rank>,<number>."""
    seed, rank, number = map(int, which.split(","))
    state = state_on(line(), seed)
    dist.barrier()
    with calls(folder, kit.kill, {"": number} if dist.get_rank() == rank else {}):
        chkpt.save_sharded(state, folder / NAME)


def killed_after(folder: Path, which: str) -> None:
    """As `killed_at`, but at an instant, in microseconds: <seed>,<rank>,<microseconds>."""
    seed, rank, microseconds = map(int, which.split(","))
    state = state_on(line(), seed)
    dist.barrier()
    if dist.get_rank() == rank:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, microseconds / 1e6)
    for _ in range(50):
        chkpt.save_sharded(state, folder / NAME)


def plain_dcp_save(folder: Path, seed: str) -> None:
    """The control: torch alone saves over an older one."""
    warnings.simplefilter("ignore")
    dcp.save({"model": {"net": state_on(line(), int(seed))["model"]["net"]}}, checkpoint_id=folder / "plain")


def plain_dcp_killed(folder: Path, seed: str) -> None:
    """The control: rank 1 is killed before it writes."""
    if dist.get_rank() == 1:
        FileSystem.create_stream = lambda *args: kit.kill("")
    plain_dcp_save(folder, seed)


def plain_dcp_seeds(folder: Path, _: str) -> list[int]:
    """Which of the states are in what torch alone wrote."""
    mesh = line()
    loaded = {"model": {"net": {n: torch.zeros_like(t) for n, t in state_on(mesh)["model"]["net"].items()}}}
    dcp.load(loaded, checkpoint_id=folder / "plain")
    found = loaded["model"]["net"]["large"].full_tensor()
    return [s for s in (1, 2) if any(equal(x, y) for x, y in zip(found, whole(s)["large"], strict=True))]


# The machine


def ranks(folder: Path, step: str, world: int, argument: str) -> list[Any]:
    """Call a step in this many forked processes that form a group; what came of it in each."""
    meeting = tempfile.mktemp(dir=folder.parent)
    pids = []
    outs = [Path(f"{meeting}.{rank}") for rank in range(world)]
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            try:
                _rank(folder, step, world, rank, argument, meeting, outs[rank])
            finally:
                os._exit(70)
        pids.append(pid)
    results = []
    for pid, out in zip(pids, outs, strict=True):
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        results.append(json.loads(out.read_text()) if status == 0 else status)
        out.unlink(missing_ok=True)
    Path(meeting).unlink(missing_ok=True)
    return results


def _rank(folder: Path, step: str, world: int, rank: int, argument: str, meeting: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        result = {"returned": globals()[step](folder, argument)}
    except Exception as error:
        result = {"raised": f"{type(error).__name__}: {error}"}
    out.write_text(json.dumps(result))
    if world > 1 and "raised" not in result:
        dist.barrier()
    os._exit(0)


def survivors(folder: Path) -> tuple[str, list[str]]:
    """After a kill: which state is there, and what is there besides once a store has swept."""
    path = folder / NAME
    try:
        chkpt.verify(path)
        loaded = chkpt.load(path)
    except (OSError, chkpt.CheckpointError) as error:
        return f"lost: {error}", []
    which = str(seed_of(loaded) or "torn")
    chkpt.CheckpointStore(folder, "run").close()
    (shards,) = path.glob("shards-*")
    entries = {entry.name for entry in path.iterdir()} - {"helios.pth", shards.name}
    return which, sorted(entries | {entry.name for entry in folder.iterdir()} - {NAME, "plain"})


def storm(folder: Path, argument: str) -> dict[str, Any]:
    """Kill ranks during saves over an older one: <calls or time>,<number of kills>[,<seed of the choice>]."""
    kind, count, *rest = argument.split(",")
    rng = random.Random(int(rest[0]) if rest else 0)
    ranks(folder, "save", 2, "1")
    events = [len(result["returned"]) for result in ranks(folder, "count_calls", 2, "1")]
    every = [(rank, number) for rank in (0, 1) for number in range(events[rank])]
    outcomes: dict[str, int] = {}
    wrong: list[str] = []
    before = 1
    for kill in range(min(int(count), len(every)) if kind == "calls" else int(count)):
        after = 3 - before
        if kind == "calls":
            rank, number = every[kill * len(every) // min(int(count), len(every))]
            results = ranks(folder, "killed_at", 2, f"{after},{rank},{number}")
        else:
            rank, number = rng.randrange(2), rng.randrange(1, 400_000)
            results = ranks(folder, "killed_after", 2, f"{after},{rank},{number}")
        if results[rank] != -signal.SIGKILL:
            wrong.append(f"rank {rank} at {number}: not killed, {results}")
        which, besides = survivors(folder)
        name = {str(before): "old", str(after): "new"}.get(which, which)
        outcomes[name] = outcomes.get(name, 0) + 1
        if name not in ("old", "new") or besides:
            wrong.append(f"rank {rank} at {number}: {which}, besides {besides}")
            ranks(folder, "save", 2, str(before))
        else:
            before = int(which)
    return {"outcomes": outcomes, "wrong": wrong, "calls": events}


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0])
    for step in arguments[1:]:
        name, world, *argument = step.split(":")
        started = time.monotonic()
        found: Any
        if name == "storm":
            found = storm(folder, argument[0])
        else:
            found = ranks(folder, name, int(world), argument[0] if argument else "")
        print(json.dumps(found), flush=True)
        print(f"{step}: {time.monotonic() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    # What DTensors import when they are first used, once instead of in every rank of every step.
    importlib.import_module("torch._dynamo")
    main(sys.argv[1:])
