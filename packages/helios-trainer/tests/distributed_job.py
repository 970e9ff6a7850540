"""All of helios.trainer.distributed in a group. Arguments: a folder for each rank's result, and numbers of processes.

Under torchrun it is one rank of the group; else it spawns groups of so many processes.
"""

import contextlib
import functools
import io
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import helios.trainer.distributed as hd
from helios.trainer._execution import select_executions
from helios.trainer._launch import launch, make_stop_flag
from helios.trainer._spawn_queue import SpawnQueue

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.int16, torch.uint8,
]  # fmt: skip


def inputs(rank):
    """Tensors of a rank: of all dtypes, some scalar, empty, transposed, or that need gradients."""
    generator = torch.Generator().manual_seed(rank)

    def make(*shape, dtype=torch.float32):
        return (10 * torch.randn(shape, generator=generator)).to(dtype)

    tensors = [make(2, 3, dtype=dtype) for dtype in DTYPES]
    tensors += [
        make(),
        make(0, 3),
        make(4, 3).T,
        make(1000).requires_grad_(),
        make(5, dtype=torch.complex64).conj(),
    ]
    return tensors


def printed(print_it):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_it()
    return out.getvalue()


def refused(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def look():
    """Everything, in a rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = inputs(rank)
    copies = [tensor.detach().clone() for tensor in mine]
    info = hd.get_dist_info()
    flags = torch.tensor([[True], [rank == 0]])
    result = {
        "info": [info.rank, info.local_rank, info.world_size, info.local_world_size],
        "getters": [
            hd.get_global_rank(),
            hd.get_local_rank(),
            hd.get_world_size(),
            hd.get_local_world_size(),
        ],
        "is active": hd.is_dist_active(),
        "is torchrun": hd.is_using_torchrun(),
        "gathered": [hd.gather_into_tensor(t, (size, *t.shape)) for t in mine],
        "in a row": hd.gather_into_tensor(mine[0], size * mine[0].numel()),
        "behind": hd.gather_into_tensor(mine[0], torch.Size([size * 2, 3])),
        "bools": hd.gather_into_tensor(flags, [size * 2, 1]),
        "list": hd.all_reduce_tensors(mine),
        "tuple": hd.all_reduce_tensors(tuple(mine[:2])),
        "separately": [hd.all_reduce_tensors(t) for t in mine],
        "empty": hd.all_reduce_tensors([]),
        "max": hd.all_reduce_tensors(mine[0], op=dist.ReduceOp.MAX),
        "min": hd.all_reduce_tensors(mine[0], op=dist.ReduceOp.MIN),
        "product": hd.all_reduce_tensors(mine[0], op=dist.ReduceOp.PRODUCT),
        "by torch": [],
        "refused": {
            "size": refused(hd.gather_into_tensor, mine[0], (size, 2)),
            "gather a list": refused(hd.gather_into_tensor, [1], 1),
            "reduce a number": refused(hd.all_reduce_tensors, [mine[0], 3]),
            "bool": refused(hd.all_reduce_tensors, flags),
            "op": refused(hd.all_reduce_tensors, mine[0], op=dist.ReduceOp.BAND),
            "init": refused(hd.init_dist),
        },
        "printed": [
            printed(lambda: hd.global_print("a", 1, sep="-")),
            printed(lambda: hd.global_print("b", global_rank=1, end="")),
            printed(lambda: hd.local_print("c")),
            printed(lambda: hd.local_print("d", local_rank=1)),
        ],
    }
    for tensor in mine[:2]:
        flat = torch.cat([copies[0].reshape(-1).repeat(40), tensor.detach().float().reshape(-1)])
        dist.all_reduce(flat)
        result["by torch"].append(flat[-tensor.numel() :].reshape(tensor.shape))
    result["unchanged"] = all(torch.equal(a.detach(), b) for a, b in zip(mine, copies, strict=True))
    big = torch.arange(7.0) + rank
    hd._PIECE_BYTES = 8  # two numbers at a time
    result["in pieces"] = hd.all_reduce_tensors(big)
    hd.safe_barrier()
    return result


def look_in_rank(folder, execution, context):
    torch.save(look(), folder / f"{execution.world_size}-{execution.rank}.pt")


def main():
    folder = Path(sys.argv[1])
    if hd.is_using_torchrun():
        hd.init_dist(timeout_s=60)
        size, rank = hd.get_world_size(), hd.get_global_rank()
        torch.save(look(), folder / f"{size}-{rank}.pt")
        hd.shutdown_dist()
        assert not hd.is_dist_active()
        hd.shutdown_dist()  # does nothing
        return
    for size in map(int, sys.argv[2:]):
        options = {"queue": SpawnQueue(), "timeout_s": 60, "stop_flag": make_stop_flag(), "listens": False}
        launch(functools.partial(look_in_rank, folder), select_executions(True, None, size), **options)


if __name__ == "__main__":
    main()
