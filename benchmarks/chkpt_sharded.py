"""Table 17: saving and loading what is spread over ranks, beside torch.distributed.checkpoint alone."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, empty

from benchmarks.harness import MIB, Case, Options, ratio, table, timed
from benchmarks.ranks import in_ranks
from helios.chkpt import load_sharded, save_sharded

TITLE = "Sharded checkpoints: saving and loading, beside torch.distributed.checkpoint"
NOTES = (
    "A state of DTensors, a part of each in every rank, gloo, on the disk. dcp.save is what helios-chkpt saves with; "
    "it syncs its files too. helios-chkpt besides takes SHA-256 of all, verifies its own part of the files when it "
    "loads, and commits with one rename; while it writes, torch's CRC-32 is off. dcp.load reads into tensors that "
    "there are, load_sharded makes them. The contenders take turns; medians, and the median ratio of neighbours."
)
_TENSOR_MIB = 16


def run_case(case: Case) -> dict[str, list[float]]:
    """Measure, as a rank: microseconds of every turn, by contender."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = _TENSOR_MIB * MIB // 4 // 1024
    state: dict[str, Any] = {
        f"tensor{number}": empty(rows, 1024, device_mesh=mesh, placements=[Shard(0)])
        for number in range(case["mib"] // _TENSOR_MIB)
    }
    for tensor in state.values():
        assert isinstance(tensor, DTensor)
        torch.nn.init.normal_(tensor.to_local())
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(shared, src=0)
    root = Path(shared[0])
    runs: dict[str, Callable[[], object]] = {
        "dcp.save": lambda: dcp.save(state, checkpoint_id=root / "plain"),
        "helios save_sharded": lambda: save_sharded(state, root / "ours.dcp"),
        "dcp.load": lambda: dcp.load(state, checkpoint_id=root / "plain"),
        "helios load_sharded": lambda: load_sharded(root / "ours.dcp", meshes=[mesh]),
        "helios load_sharded, verify=False": lambda: load_sharded(
            root / "ours.dcp", meshes=[mesh], verify=False
        ),
    }
    took: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(case["turns"] + 1):
        for name, run in runs.items():
            if name.endswith(("save", "save_sharded")) and dist.get_rank() == 0:
                shutil.rmtree(root / ("plain" if name == "dcp.save" else "ours.dcp"), ignore_errors=True)
            dist.barrier()
            took_us = timed(lambda run=run: (run(), dist.barrier()))  # type: ignore[misc]
            if turn > 0:
                took[name].append(took_us)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(root)
    return took


def run(options: Options) -> str:
    """Return the table."""
    mib = options.mib // 2
    rows = []
    for world in (2, 4):
        took = in_ranks("chkpt_sharded", world, {"mib": mib, "turns": 21 if options.large else 9})
        for name, times in took.items():
            plain = took["dcp.save" if "save" in name else "dcp.load"]
            rows.append(
                [f"{world} ranks, {mib} MiB: {name}", median(times) / 1e6, f"{ratio(times, plain):.2f}"]
            )
    return table(["contender", "seconds", "times dcp"], rows)
