"""Files that earlier releases really wrote: each migrates, and nothing of it is lost or other than it was."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch

from helios import chkpt
from helios.chkpt_migrator import migrate_checkpoints_to_current_version
from helios.chkpt_migrator._migrate import migrate_file

LEGACY = Path(__file__).parent / "legacy"
FILES = sorted(str(path.relative_to(LEGACY)) for path in LEGACY.rglob("*.pth"))
SCHEMAS = {"0.2.0": 0, "0.3.0": 0, "1.0.0": 0, "1.1.0": 1, "1.4.1": 1, "2.0.0": 2, "2.0.1": 2}


class Stand:
    """What earlier releases pickled, opened with stand-ins, as the fixtures' README says. For comparison only."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fields = state


class Text(str):
    __slots__ = ()


def opened(path: Path) -> dict[str, Any]:
    """An old file as torch reads it, with stand-ins for the classes it names."""
    stand_ins = [
        (Stand, "helios.trainer.TrainingState"),
        (Text, "helios.trainer._CheckpointKeys"),
        (Text, "helios.model.model._InternalStateKeys"),
        (PurePosixPath, "pathlib.PosixPath"),
    ]
    with torch.serialization.safe_globals(stand_ins):
        state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def bits(value: Any) -> Any:
    """Anything of tensors and plain values, in a form in which == compares types, order and bits."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), raw(value)
    if isinstance(value, dict):
        return (
            type(value).__name__,
            [(k, bits(v)) for k, v in value.items()],
            bits(getattr(value, "_metadata", None)),
        )
    if isinstance(value, list | tuple):
        return type(value).__name__, [bits(item) for item in value]
    return type(value).__name__, value


def flat(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{where}.{key}")
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, item in enumerate(value):
            yield from flat(item, f"{where}.{index}")
    else:
        yield where, value


def digest(tensor: torch.Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"sha256": hashlib.sha256(raw(tensor)).hexdigest(), "dtype": dtype, "shape": list(tensor.shape)}


def described(value: Any) -> dict[str, Any]:
    return {"type": type(value).__name__, "value": list(value) if isinstance(value, tuple) else value}


@pytest.fixture
def migrated(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / Path(request.param).name
    shutil.copy(LEGACY / request.param, path)
    assert migrate_file(path).outcome == "migrated"
    return path


both = pytest.mark.parametrize(
    ("migrated", "name"), [(name, name) for name in FILES], indirect=["migrated"], ids=FILES
)


def test_all_of_them_are_here() -> None:
    assert len(FILES) == 32
    for name in FILES:
        expected = json.loads((LEGACY / name).with_suffix(".expected.json").read_text())
        assert hashlib.sha256((LEGACY / name).read_bytes()).hexdigest() == expected["sha256"]


@both
def test_every_value_is_as_the_release_that_wrote_it_read_it(migrated: Path, name: str) -> None:
    expected = json.loads((LEGACY / name).with_suffix(".expected.json").read_text())
    state = torch.load(migrated, weights_only=True)
    assert {type(key) for key in state} == {str}
    fields = expected["training_state"]["fields"]
    assert state["training_state"] == fields
    assert {k: type(v).__name__ for k, v in state["training_state"].items()} == expected["training_state"][
        "field_types"
    ]
    prefix = expected["model"]["user_state_prefix"]
    values = dict(flat(state["model"], prefix))
    values.update(
        {k.replace("model.user.amp_scaler", "model.amp_scaler"): v for k, v in values.items() if "amp_" in k}
    )
    values.update(flat(state["rng"], "rng"))
    assert {k: digest(values[k]) for k in expected["tensors"]} == expected["tensors"]
    assert {k: described(values[k]) for k in expected["model"]["values"]} == expected["model"]["values"]
    assert state.get("log_path") == expected["log_path"]
    assert state.get("run_path") == expected["run_path"]
    for plug_id, plug_in in (expected["plugins"] or {}).items():
        values = dict(flat(state[plug_id], plug_id))
        assert {k: digest(values[k]) for k in plug_in["tensors"]} == plug_in["tensors"]
        assert {k: described(values[k]) for k in plug_in["values"]} == plug_in["values"]
        assert len(values) == len(plug_in["tensors"]) + len(plug_in["values"])
    phase = (expected["datamodule"] or {}).get("phase", 0)
    assert state.get("datamodule") == ({"phase": phase} if phase else None)
    own = {"training_state", "model", "rng", "version", "data", "log_path", "run_path", "datamodule"}
    assert set(state) - own == set(expected["plugins"] or {})


@both
def test_the_generators_are_those_of_the_file(migrated: Path, name: str) -> None:
    expected = json.loads((LEGACY / name).with_suffix(".expected.json").read_text())["rng"]
    rng = chkpt.load(migrated)["rng"]
    assert list(rng) == ["torch", "python", "numpy"]
    assert digest(rng["torch"]) == expected["torch"]
    version, words, gauss = rng["python"]
    assert (version, gauss) == (expected["rand"]["version"], expected["rand"]["gauss_next"])
    assert type(rng["python"]) is type(words) is tuple
    packed = struct.pack(f"<{len(words)}I", *words)
    assert hashlib.sha256(packed).hexdigest() == expected["rand"]["words_sha256_as_little_endian_uint32"]
    numbers = {key: int(expected["numpy"][key]) for key in ("state", "inc")}
    assert rng["numpy"] == {
        "bit_generator": "PCG64", "state": numbers,
        "has_uint32": expected["numpy"]["has_uint32"], "uinteger": expected["numpy"]["uinteger"],
    }  # fmt: skip


@both
def test_the_users_state_is_the_same_to_the_last_attribute(migrated: Path, name: str) -> None:
    """Against torch's own reading of the old file: order of keys, `_metadata`, tuples, what is tied."""
    before, after = opened(LEGACY / name), chkpt.load(migrated)
    model = before["model"]
    is_nested = any(type(key) is Text for key in model)
    user = dict(model["user"]) if is_nested else model
    if is_nested and "amp_scaler" in model:
        user["amp_scaler"] = model["amp_scaler"]
    assert bits(after["model"]) == bits(user)
    assert after["model"]["net"]._metadata


@both
def test_it_says_where_the_run_stood_in_its_data(migrated: Path, name: str) -> None:
    state = chkpt.load(migrated)
    fields = state["training_state"]
    epoch = fields["global_epoch"] - (fields["dataset_iter"] > 0)
    assert state["data"] == {
        "format": 0, "algorithm": "torch-randperm-v1", "epoch": epoch, "batches": fields["dataset_iter"],
    }  # fmt: skip


@both
def test_the_file_is_of_this_release_and_verified(migrated: Path, name: str) -> None:
    chkpt.verify(migrated)
    state = chkpt.load(migrated)
    assert state["version"] == chkpt.__version__
    mapped = chkpt.load(migrated, mmap=True)
    assert bits(mapped) == bits(state)
    assert bits(torch.load(migrated, weights_only=True)) == bits(state)
    assert chkpt.find_last_checkpoint(migrated.parent, "tiny") == migrated


@pytest.mark.parametrize(
    ("module", "kind", "parts", "text"),
    [
        ("pathlib", "PosixPath", ("/", "tmp", "run", "a.log"), "/tmp/run/a.log"),
        ("pathlib._local", "PosixPath", ("/tmp/run/a.log",), "/tmp/run/a.log"),  # CPython 3.13
        ("pathlib", "WindowsPath", ("C:\\", "run", "a.log"), "C:\\run\\a.log"),
        ("pathlib._local", "WindowsPath", ("C:\\run\\a.log",), "C:\\run\\a.log"),
    ],
)
def test_paths_as_every_python_and_system_pickles_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, kind: str, parts: tuple[str, ...], text: str
) -> None:
    """In real bytes: a class of that name, pickled as such a Python does, and gone when the file is read."""
    stand_in = type(kind, (), {"__module__": module, "__reduce__": lambda self: (stand_in, parts)})
    state = torch.load(LEGACY / "0.3.0/epoch/tiny_epoch_2_iter_20.pth", weights_only=True)
    path = tmp_path / "a.pth"
    with monkeypatch.context() as patch:
        fake = types.ModuleType(module)
        vars(fake)[kind] = stand_in
        patch.setitem(sys.modules, module, fake)
        torch.save({**state, "log_path": stand_in(), "run_path": stand_in()}, path)
    result = migrate_file(path)
    assert result.outcome == "migrated", result.reason
    after = torch.load(path, weights_only=True)
    assert after["log_path"] == after["run_path"] == text


def test_every_kind_of_value_that_torch_saves(tmp_path: Path) -> None:
    """Not only what the fixtures hold: parameters, ties, views, other dtypes, things that stand for plain values."""
    state = torch.load(LEGACY / "0.3.0/epoch/tiny_epoch_2_iter_20.pth", weights_only=True)
    base = torch.arange(12.0).reshape(3, 4)
    own = {
        "parameter": torch.nn.Parameter(base[0].clone()),
        "tied": base,
        "column": base[:, 1],
        "again": base,
        **{
            str(d): torch.ones(3).to(d)
            for d in (torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool)
        },
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "plain": [None, True, 2**100, -1, math.inf, "x", b"\x00\xff", (1, (2.5,)), 1j],
        "set": {3, "x", (1, 2)},
        "bytearray": bytearray(b"x\xff"),
    }
    state["model"]["own"] = own
    path = tmp_path / "a.pth"
    torch.save(state, path)
    result = migrate_file(path)
    assert result.outcome == "migrated", result.reason
    for after in (chkpt.load(path)["model"]["own"], torch.load(path, weights_only=True)["model"]["own"]):
        assert bits(after) == bits(own)
        assert after["tied"] is after["again"]
        assert after["column"].untyped_storage().data_ptr() == after["tied"].untyped_storage().data_ptr()
        assert after["column"].stride() == (4,)


def snapshot(root: Path) -> dict[str, tuple[int, int, int, bytes]]:
    files = [(path, path.stat()) for path in sorted(root.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(root)): (
            status.st_ino,
            status.st_mtime_ns,
            status.st_ctime_ns,
            path.read_bytes(),
        )
        for path, status in files
    }


def test_a_whole_folder_and_again(tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(LEGACY, root)
    before = snapshot(root)
    dry = migrate_checkpoints_to_current_version(root, dry_run=True)
    assert snapshot(root) == before
    assert dry.counts() == {"current": 0, "migrated": 0, "would migrate": 32, "failed": 0}
    report = migrate_checkpoints_to_current_version(root)
    assert report.ok
    assert report.counts() == {"current": 0, "migrated": 32, "would migrate": 0, "failed": 0}
    for result in report.results:
        name = str(result.path.relative_to(root))
        assert (result.source, result.target) == (SCHEMAS[name.split("/")[0]], 3)
        assert result.backup == result.path.with_name(result.path.name + ".bak")
        assert result.backup.stat().st_ino == before[name][0]  # the very file
        assert result.backup.read_bytes() == before[name][3]
        assert result.path.stat().st_mtime_ns == before[name][1]
    after = snapshot(root)
    again = migrate_checkpoints_to_current_version(root)
    assert again.counts() == {"current": 32, "migrated": 0, "would migrate": 0, "failed": 0}
    assert snapshot(root) == after
    assert len(after) == 3 * 32


def test_torch_is_never_imported(tmp_path: Path) -> None:
    shutil.copytree(LEGACY, tmp_path / "root")
    code = """
import sys
from pathlib import Path
from helios.chkpt_migrator import migrate_checkpoints_to_current_version
assert migrate_checkpoints_to_current_version(Path(sys.argv[1])).counts()["migrated"] == 32
assert not {"torch", "numpy", "helios.trainer", "helios.model"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "root")], check=True)


def test_no_class_of_a_file_is_imported_or_made(tmp_path: Path) -> None:
    """An importable `helios.trainer.TrainingState` would be filled in without `__init__` being called."""
    for part in ("trainer", "model"):
        (tmp_path / "helios" / part).mkdir(parents=True)
        (tmp_path / "helios" / part / "__init__.py").write_text("raise SystemExit('imported')\n")
    shutil.copytree(LEGACY, tmp_path / "root")
    command = [sys.executable, "-m", "helios.chkpt_migrator", str(tmp_path / "root")]
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_release_2_migrated_before_ends_the_same(tmp_path: Path) -> None:
    """Files of 0.2.0, migrated by us, and by 2.0.1's own tool first and then by us."""
    for name in ("tiny_epoch_2_iter_6.pth", "tiny_epoch_3_iter_12.pth"):
        states = []
        for variant in ("0.2.0/logging", "2.0.1/migrated_from_0.2.0"):
            path = tmp_path / variant.replace("/", "_") / name
            path.parent.mkdir(exist_ok=True)
            shutil.copy(LEGACY / variant / name, path)
            migrate_file(path)
            states.append(bits(chkpt.load(path)))
        assert states[0] == states[1]


def test_control_a_changed_number_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    shutil.copy(LEGACY / FILES[0], path)
    migrate_file(path)
    state = chkpt.load(path)
    weight = state["model"]["net"]["weight"]
    before = bits(state)
    weight[0, 0] = math.nextafter(float(weight[0, 0]), math.inf) + 2e-7
    assert bits(state) != before


@both
def test_it_is_the_file_that_saving_the_same_state_gives(migrated: Path, name: str, tmp_path: Path) -> None:
    state = chkpt.load(migrated)
    del state["version"]
    again = chkpt.save(state, tmp_path / "again.pth")
    assert again.read_bytes() == migrated.read_bytes()
