"""The slow session: every fault of the fault table, as often as it says, counted; `nox -s faults`.

    python fault_session.py [PART ...] [--tries FACTOR]

Prints the table, and exits with 1 if anything was lost, undetected or wrong. FACTOR scales the numbers of tries that
are not given by the file (every bit, every length). The tests take the same functions with small numbers.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import chkpt_kit as kit

from helios import chkpt
from helios.chkpt._format.archive import open_archive, open_file
from helios.chkpt._sharded.convert import convert

SMALL: dict[str, object] = {"w": torch.arange(4.0), "n": {"x": [1, 2.5, "a"]}, "b": (b"\0", True, None, -1)}
KILLS = 1000
BITS = 100_000
SEED = 20261123


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        fault: what was done.
        tries: how often.
        lost: nothing that verifies was left.
        undetected: something else was read than was written, and nothing was said.
        wrong_error: an error of another kind than it should be.
        note: more about it.
        is_control: the line of somebody else's code, which is to fail.
    """

    fault: str
    tries: int
    lost: int
    undetected: int
    wrong_error: int
    note: str = ""
    is_control: bool = False

    @property
    def ok(self) -> bool:
        failures = self.lost + self.undetected + self.wrong_error
        return (failures > 0) if self.is_control else failures == 0


def storm(operation: str, how: str, *numbers: int) -> dict[str, int]:
    """Run the storm of kills in a process and a folder of its own."""
    driver = Path(__file__).parent / "storm_driver.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(driver), folder, operation, how, *map(str, numbers)]
        done = subprocess.run(command, check=True, capture_output=True)
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def kills(factor: float) -> Iterable[Row]:
    for operation in ("overwrite", "async", "retention", "migrate"):
        for how, tries in (("calls", ()), ("random", (round(KILLS * factor), SEED))):
            counts = storm(operation, how, *tries)
            name = f"kill -9, {operation}, {'at a random instant' if how == 'random' else 'at every call'}"
            note = f"{counts['orphans']} orphans, {counts['unswept']} not swept"
            lost = counts["lost"] + counts["unswept"]
            yield Row(name, counts["kills"], lost, counts["wrong"], 0, note)
    counts = storm("in_place", "random", max(20, round(KILLS * factor / 10)), SEED)
    yield Row(
        "control: torch.save in place", counts["kills"], counts["lost"], counts["wrong"], 0, is_control=True
    )


def row(fault: str, counts: Counter[str], expected: set[str], *, is_control: bool = False) -> Row:
    """Of what `kit.flipped` counted. What is identical is no fault; which error it is counts."""
    errors = {name: count for name, count in counts.items() if name not in ("identical", "undetected")}
    wrong = 0 if is_control else sum(count for name, count in errors.items() if name not in expected)
    note = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if name != "undetected")
    return Row(fault, counts.total(), 0, counts["undetected"], wrong, note, is_control)


def torch_save(state: dict[str, object], path: Path) -> Path:
    torch.save({**state, "version": chkpt.__version__}, path)
    return path


def torch_load(path: Path) -> object:
    return torch.load(path, weights_only=True)


def bits(factor: float) -> Iterable[Row]:
    corrupt = {"CorruptError"}
    with tempfile.TemporaryDirectory() as name:
        path = chkpt.save(SMALL, Path(name) / "a.pth")
        every = range(8 * path.stat().st_size)
        for how, read in (("load", chkpt.load), ("verify", chkpt.verify)):
            yield row(
                f"every bit of a small file, {how}", kit.flipped(path, every, read, read(path)), corrupt
            )
        found = kit.flipped(path, every, torch_load, torch_load(path), lambda error: True)
        yield row("control: the same, torch.load", found, corrupt, is_control=True)
        path = torch_save(SMALL, Path(name) / "b.pth")
        every = range(8 * path.stat().st_size)
        for how, read in (("load", chkpt.load), ("verify and load", verify_and_load)):
            found = kit.flipped(path, every, read, read(path))
            yield row(f"every bit of a file of torch.save, {how}", found, corrupt | {"NotACheckpointError"})


def verify_and_load(path: Path) -> object:
    chkpt.verify(path)
    return chkpt.load(path)


def large(factor: float) -> Iterable[Row]:
    rng = random.Random(SEED)
    for mib, tries in ((16, BITS), (64, BITS // 20)):
        with tempfile.TemporaryDirectory() as name:
            state = {str(i): torch.randn(mib << 12) for i in range(64)}
            path = chkpt.save(state, Path(name) / "a.pth")
            positions = [rng.randrange(8 * path.stat().st_size) for _ in range(round(tries * factor))]
            found = kit.flipped(path, positions, verify_crc, None)
            yield row(f"bits of a file of {mib} MiB, CRC-32 as in load", found, {"CorruptError"})
            found = kit.flipped(path, positions[: len(positions) // 100], chkpt.verify, None)
            yield row(f"bits of a file of {mib} MiB, verify", found, {"CorruptError"})


def verify_crc(path: Path) -> None:
    chkpt.verify(path, digests=False)


def lengths(factor: float) -> Iterable[Row]:
    for who, writer in (("our own", chkpt.save), ("torch.save's", torch_save)):
        with tempfile.TemporaryDirectory() as name:
            path = writer(SMALL, Path(name) / "a.pth")
            raw = path.read_bytes()
            cut = (raw[:length] for length in range(len(raw)))
            yield broken(f"every truncation of {who} file", cut, path, {"TruncatedError"})
            rng = random.Random(SEED)
            behind = (raw + rng.randbytes(rng.randrange(1, 200)) for _ in range(round(2000 * factor)))
            yield broken(f"bytes behind {who} file", behind, path, {"CorruptError", "TruncatedError"})
            before = (rng.randbytes(rng.randrange(1, 200)) + raw for _ in range(round(2000 * factor)))
            kinds = {"CorruptError", "NotACheckpointError"}
            yield broken(f"bytes before {who} file", before, path, kinds)
            within = (spoiled(raw, rng) for _ in range(round(20_000 * factor)))
            kinds |= {"TruncatedError"}
            yield broken(
                f"a run of bytes of {who} file zeroed, swapped, cut out or repeated", within, path, kinds
            )


def crafted(factor: float) -> Iterable[Row]:
    """Pickles and manifests that somebody changed, in archives whose sums are right: whatever happens is an error."""
    rng = random.Random(SEED)
    opcodes = [bytes([code]) for code in range(256)] + [
        b"](",
        b"}(",
        b"h\x00",
        b"q\x00",
        b")R",
        b"\x85R",
        b"K\x01",
    ]
    rich = {
        **SMALL,
        "o": OrderedDict(a=1),
        "t": (1, (2, "x")),
        "s": torch.eye(2).to_sparse(),
        "c": Counter("ab"),
    }
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.pth"
        with open_file(chkpt.save(rich, path)) as file:
            archive = open_archive(file, path)
            contents = {
                key: os.pread(file.fileno(), r.num_bytes, r.offset) for key, r in archive.records.items()
            }
        storages = [contents[f"data/{number}"] for number in range(len(archive.storages))]
        for what in ("pickle", "manifest"):
            counts: Counter[str] = Counter()
            for _ in range(round(30_000 * factor)):

                def changed(data: bytes) -> bytes:
                    for _ in range(rng.choice([1, 1, 1, 2, 5])):
                        at, size = rng.randrange(len(data)), rng.choice([0, 1, 1, 2, 8])
                        data = data[:at] + rng.choice(opcodes) * rng.choice([0, 1, 1, 3]) + data[at + size :]
                    return data

                if what == "pickle":
                    kit.archive(path, changed(archive.pickle), *storages)
                else:
                    kit.archive(path, archive.pickle, *storages, manifest=changed)
                for read in (chkpt.verify, chkpt.load):
                    try:
                        read(path)
                        counts["another state"] += 1  # that is what the file says now
                    except chkpt.CheckpointError as error:
                        counts[type(error).__name__] += 1
                    except Exception as error:
                        if "restore data location" in str(error):  # torch's, of a device that nobody has
                            counts["other device"] += 1
                            continue
                        counts["wrong error"] += 1
                        logging.critical("%s: %r", type(error).__name__, error)
            errors = {kind.__name__ for kind in chkpt.CheckpointError.__subclasses__()}
            kinds = {"another state", "other device"} | errors
            yield row(f"a changed {what} under sums that are right", counts, kinds)


def spoiled(raw: bytes, rng: random.Random) -> bytes:
    """The bytes with something done to a run of them; never the same."""
    while True:
        first, second = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
        run = raw[first:second]
        choices = [bytes(len(run)), run[::-1], b"", run + run, rng.randbytes(len(run)), b"\xff" * len(run)]
        changed = raw[:first] + rng.choice(choices) + raw[second:]
        if changed != raw:
            return changed


def broken(fault: str, contents: Iterable[bytes], path: Path, expected: set[str]) -> Row:
    """A line of what `load` and `verify` make of these contents of a file."""
    raw = path.read_bytes()
    whole = chkpt.load(path)
    counts: Counter[str] = Counter()
    for content in contents:
        path.write_bytes(content)
        for read in (chkpt.load, verify_and_load):
            try:
                counts["identical" if kit.same(read(path), whole) else "undetected"] += 1
            except chkpt.CheckpointError as error:
                counts[type(error).__name__] += 1
            except Exception:
                counts["wrong error"] += 1
    path.write_bytes(raw)
    return row(fault, counts, expected)


def sharded(factor: float) -> Iterable[Row]:
    """Ranks that are killed before each of their calls, and at random instants; every bit of a small folder."""
    driver = Path(__file__).parent / "shard_driver.py"
    for how, tries in (("calls", 10**6), ("time", round(KILLS * factor / 10))):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "f"
            folder.mkdir()
            command = [sys.executable, str(driver), str(folder), f"storm:0:{how},{tries},{SEED}"]
            found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            outcomes, wrong = found["outcomes"], found["wrong"]
            fault = (
                f"kill -9 of a rank, sharded, {'at a random instant' if how == 'time' else 'at every call'}"
            )
            good = outcomes.get("old", 0) + outcomes.get("new", 0)
            yield Row(
                fault, sum(outcomes.values()), sum(outcomes.values()) - good, len(wrong), 0, str(outcomes)
            )
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.dcp"
        convert(chkpt.save({"model": {"w": torch.arange(6.0)}, "n": 1}, Path(name) / "a.pth"), path)
        for file in sorted(path.rglob("*")):
            if file.is_file():
                every = range(8 * file.stat().st_size)
                counts = kit.flipped(file, every, lambda _: chkpt.verify(path), object())
                kinds = {"CorruptError", "NotACheckpointError", "TruncatedError"}
                yield row(f"every bit of {file.name} of a small folder, verify", counts, kinds)


PARTS: dict[str, Callable[[float], Iterable[Row]]] = {
    "bits": bits,
    "lengths": lengths,
    "crafted": crafted,
    "kills": kills,
    "large": large,
    "sharded": sharded,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--tries", type=float, default=1.0)
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| fault | tries | lost | undetected | wrong error | |\n|---|---:|---:|---:|---:|---|", flush=True)
    ok = True
    for part in options.parts:
        for line in PARTS[part](options.tries):
            ok &= line.ok
            numbers = f"{line.tries} | {line.lost} | {line.undetected} | {line.wrong_error}"
            print(f"| {line.fault} | {numbers} | {line.note} |", flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
