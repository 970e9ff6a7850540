"""Table 9: what loading and verifying cost, and how soon the first tensor is there."""

import hashlib
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.chkpt_states import TENSOR_MIB, large_state, remove, scratch, size, took
from benchmarks.harness import MIB, Case, Options, in_fresh_process, interleave, ratio, table
from helios.chkpt import load, save, verify

TITLE = "Load: milliseconds until a state is there"
NOTES = (
    "The same file each time, written by Helios and in the page cache. Load: until the call returns. Used: until "
    "every tensor was read once (`sum`) too, since a mapped file is read only then. Repeated: turns in one process; "
    "ratios are medians over neighbouring turns. Fresh: the median of processes that load for the first time "
    "(something small was loaded before, so that nothing is left to import), where new memory costs page faults. "
    "read: the bytes of the file into memory that is there. safetensors: the same tensors in a file of its own, which "
    "it maps. First tensor: from the path to the first number of the first tensor, repeated in one process; files of "
    "256 tensors. Verify: of the whole file, repeated; beside it, reading it in blocks of 4 MiB without and with "
    "zlib's CRC-32 and SHA-256."
)
FRESH_PROCESSES = 3
NUM_TENSORS = 256
Tensors = dict[str, torch.Tensor]


def helios(folder: Path, mmap: bool = False, verify: bool = True) -> Tensors:
    """The load of Helios."""
    state: Any = load(folder / "state.pth", mmap=mmap, verify=verify)
    return state["model"]  # type: ignore[no-any-return]


def torch_load(folder: Path, mmap: bool) -> Tensors:
    """The load of torch."""
    return torch.load(folder / "state.pth", mmap=mmap, weights_only=True)["model"]  # type: ignore[no-any-return]


def safetensors(folder: Path) -> Tensors:
    """The load of safetensors, a peer."""
    from safetensors.torch import load_file

    return load_file(folder / "state.safetensors")


def safetensors_first(folder: Path) -> Tensors:
    """The first tensor alone, as safetensors offers."""
    from safetensors import safe_open

    with safe_open(folder / "state.safetensors", framework="pt") as file:
        name = next(iter(file.keys()))
        return {name: file.get_tensor(name)}


LOADERS: dict[str, Callable[[Path], Tensors]] = {
    "torch.load": partial(torch_load, mmap=False),
    "control": partial(torch_load, mmap=False),
    "helios load": helios,
    "helios load(verify=False)": partial(helios, verify=False),
    "torch.load(mmap=True)": partial(torch_load, mmap=True),
    "helios load(mmap=True)": partial(helios, mmap=True),
    "helios load(mmap=True, verify=False)": partial(helios, mmap=True, verify=False),
    "safetensors load_file": safetensors,
}
FIRST = {name: LOADERS[name] for name in LOADERS if "mmap" in name or name == "torch.load"}
FIRST["safetensors safe_open"] = safetensors_first


class Loaded(NamedTuple):
    """Milliseconds until the call returned, and until all was read once."""

    loaded: float
    used: float


def load_and_use(loader: Callable[[Path], Tensors], folder: Path) -> Loaded:
    """Load everything and read it."""
    result: list[Tensors] = []
    loaded = took(lambda: result.append(loader(folder))).wall
    used = took(lambda: [tensor.sum() for tensor in result[0].values()]).wall
    return Loaded(loaded, loaded + used)


def first_number(loader: Callable[[Path], Tensors], folder: Path) -> float:
    """Load and read one number."""
    return took(lambda: next(iter(loader(folder).values()))[0].item()).wall


def read_blocks(path: Path, use: Callable[[memoryview], object] = len) -> None:
    """Read a file in blocks of 4 MiB."""
    block = memoryview(bytearray(4 * MIB))
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(block):
            use(block[:num_bytes])


def with_crc(path: Path) -> None:
    """Read a file and compute its CRC."""
    sums = [0]

    def add(block: memoryview) -> None:
        sums[0] = zlib.crc32(block, sums[0])

    read_blocks(path, add)


def repeated(folder: Path, seconds: float) -> dict[str, list[float]]:
    """Return the cells of repeated loads: load, used, and their ratios to `torch.load`."""
    runs: dict[str, Callable[[], Loaded]] = {
        who: partial(load_and_use, loader, folder) for who, loader in LOADERS.items()
    }
    target = memoryview(bytearray((folder / "state.pth").stat().st_size))

    def read() -> None:
        with (folder / "state.pth").open("rb", buffering=0) as file:
            begin = 0
            while num_bytes := file.readinto(target[begin:]):
                begin += num_bytes

    def timed_read() -> Loaded:
        milliseconds = took(read).wall
        return Loaded(milliseconds, milliseconds)

    runs["read"] = timed_read
    results = interleave(runs, seconds)
    base = results["torch.load"]
    return {
        who: [
            median(turn.loaded for turn in own),
            ratio([turn.loaded for turn in own], [turn.loaded for turn in base]),
            median(turn.used for turn in own),
            ratio([turn.used for turn in own], [turn.used for turn in base]),
        ]
        for who, own in results.items()
    }


def first_tensor(folder: Path, seconds: float) -> dict[str, float]:
    """Return milliseconds until the first number."""
    runs = {who: partial(first_number, loader, folder) for who, loader in FIRST.items()}
    return {who: median(own) for who, own in interleave(runs, seconds).items()}


def verifying(folder: Path, seconds: float) -> dict[str, list[float]]:
    """Return milliseconds, GiB a second, and the ratio to reading."""
    path = folder / "state.pth"
    works: dict[str, Callable[[], object]] = {
        "read": lambda: read_blocks(path),
        "helios verify": lambda: verify(path),
        "read + zlib.crc32": lambda: with_crc(path),
        "read + sha256": lambda: read_blocks(path, hashlib.sha256().update),
    }
    turns = interleave({who: partial(took, work) for who, work in works.items()}, seconds)
    gib = path.stat().st_size / MIB / 1024
    wall = {who: [each.wall for each in own] for who, own in turns.items()}
    return {
        who: [median(own), gib / median(own) * 1e3, ratio(own, wall["read"])] for who, own in wall.items()
    }


def run_case(case: Case) -> Any:
    """Measure one thing; runs in a process of its own."""
    torch.set_num_threads(1)  # for `sum`: two of torch's threads wait for each other when a core is busy
    folder, seconds = Path(case["folder"]), case.get("seconds", 0.0)
    measure = {"repeated": repeated, "first": first_tensor, "verify": verifying}.get(case["what"])
    if measure:
        return measure(folder, seconds)
    if case["what"] == "write":
        write(folder, case["mib"], case["num_tensors"])
        return None
    loader = LOADERS[case["who"]]
    load_and_use(loader, folder / "small")
    return load_and_use(loader, folder)


def write(folder: Path, mib: int, num_tensors: int) -> None:
    """Write the files that are loaded."""
    from safetensors.torch import save_file

    folder.mkdir()
    state = large_state(mib, num_tensors)
    save(state, folder / "state.pth")
    save_file(state["model"], folder / "state.safetensors")


def files(folder: Path, mib: int, num_tensors: int) -> Path:
    """Have the files written by another process, so that its memory is gone."""
    case = {"what": "write", "folder": str(folder), "mib": mib, "num_tensors": num_tensors}
    failure = in_fresh_process("chkpt_load", case)
    if failure:
        raise RuntimeError(f"writing the files that are to be loaded failed: {failure}")
    return folder


def fresh(folder: Path) -> dict[str, list[float]]:
    """Return milliseconds of loaders in fresh processes, and the ratio to `torch.load`."""
    found: dict[str, list[float]] = {who: [] for who in LOADERS}
    for _ in range(FRESH_PROCESSES):
        for who in LOADERS:
            result = in_fresh_process("chkpt_load", {"what": "fresh", "who": who, "folder": str(folder)})
            if isinstance(result, str):
                raise RuntimeError(f"{who}: {result}")
            found[who].append(Loaded(*result).loaded)
    return {who: [median(own), ratio(own, found["torch.load"])] for who, own in found.items()}


def run(options: Options) -> str:
    """Measure all and return the tables."""
    seconds = 60 if options.large else 20

    def ask(what: str, folder: Path, seconds: float) -> Any:
        found = in_fresh_process(
            "chkpt_load", {"what": what, "folder": str(folder), "seconds": seconds}, timeout=900
        )
        if isinstance(found, str):
            raise RuntimeError(found)
        return found

    with scratch(4 * options.mib) as place:
        folder = files(place / "whole", options.mib, options.mib // TENSOR_MIB)
        files(folder / "small", 1, 1)
        again, first_time = ask("repeated", folder, seconds), fresh(folder)
        loads = [[who, *cells, *first_time.get(who, [None, None])] for who, cells in again.items()]
        verified = [[who, *cells] for who, cells in ask("verify", folder, seconds / 4).items()]
        remove(folder)
        sizes = [options.mib // 16, options.mib // 2, options.mib * 2]
        columns = []
        for mib in sizes:
            folder = files(place / "first", mib, NUM_TENSORS)
            columns.append(ask("first", folder, seconds / 4))
            remove(folder)
    firsts = [[who, *(column[who] for column in columns)] for who in FIRST]
    head = [f"load, {size(options.mib)}", "repeated, ms", "over torch.load", "used, ms", "over torch.load"]
    return "\n\n".join(
        [
            table([*head, "fresh, ms", "over torch.load"], loads),
            table(["first tensor", *(f"{size(mib)}, ms" for mib in sizes)], firsts),
            table(["verify", "ms", "GiB/s", "over read"], verified),
        ]
    )
