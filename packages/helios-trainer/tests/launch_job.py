"""What the tests of spawned processes run, as a script, since such processes import the script they come from.

Arguments: the name of a scenario below, and a file for what it returns.
"""

import atexit
import os
import queue
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from helios.trainer import _launch
from helios.trainer._execution import select_executions
from helios.trainer._launch import launch, make_stop_flag
from helios.trainer._ranks import Together
from helios.trainer._spawn_queue import SpawnQueue
from helios.trainer._stop_request import StopRequest

_launch.GRACE_S = 1.0


class OwnError(Exception):
    pass


def run(work, nprocs=1, items=None, flag=None, **options):
    """Launch, and return what came of it: the answer, or the exception's type, text and notes."""
    executions = select_executions(True, None, nprocs)
    options = {"queue": items or SpawnQueue(), "stop_flag": flag or make_stop_flag(), **options}
    try:
        return launch(work, executions, **{"timeout_s": 60, "listens": False, **options})
    except BaseException as error:
        return [type(error).__name__, str(error), "\n".join(getattr(error, "__notes__", []))]


def drained(items):
    got = []
    while not items.empty():
        got.append(items.get_nowait())
    return got


def wait_forever():
    while True:
        time.sleep(60)


# -- What ranks put, and return --


def puts(scale, shared, execution, context):
    rank = execution.rank
    shared += rank + 1  # of a tensor that was made in the parent
    answer = {
        "rank": dist.get_rank(), "size": dist.get_world_size(), "threads": torch.get_num_threads(),
        "sigint": signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "shared": shared,
    }  # fmt: skip
    context.queue.put(("first", answer))
    for number in range(10_000):
        context.queue.put((rank, number))
    context.queue.put((rank, torch.full((scale,), rank, dtype=torch.uint8)))
    refused = []
    for refuse in (lambda: context.queue.put(lambda: 0), context.queue.get, context.queue.empty):
        try:
            refuse()
        except Exception as error:
            refused.append(f"{type(error).__name__}: {error}")
    child = os.fork()
    if child == 0:
        try:
            context.queue.put("from a fork")
        except RuntimeError:
            os._exit(7)
        os._exit(0)
    refused.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    context.queue.put(("last", refused))
    return answer


def queues():
    items, shared = SpawnQueue(), torch.zeros(3)
    answer = run(partial(puts, 50_000_000, shared), 2, items)
    got = drained(items)
    kinds = {"first": [], "last": [], 0: [], 1: []}
    for kind, item in got:
        kinds[kind].append(item)
    try:
        items.get()
    except queue.Empty:
        kinds["empty"] = True
    return {"answer": answer, "shared": shared, **kinds}


# -- How ranks end --


def raises(error, execution, context):
    context.queue.put(f"from {execution.rank}")
    if execution.rank == 1:
        raise error
    wait_forever()


def dies(how, execution, context):
    context.queue.put(f"from {execution.rank}")
    if execution.rank == 0 and execution.world_size > 1:
        dist.barrier()
    how()


def one_failure():
    """A rank fails, and the other one notices nothing: it has to be killed."""
    items = SpawnQueue()
    return [run(partial(raises, OwnError("of rank 1")), 2, items), sorted(drained(items))]


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def leave_child_and_die(parent_id):
    """A child, such as a loader's worker, holds what the dead process had open."""
    if os.fork() == 0:
        while is_alive(parent_id) and not os.path.exists(sys.argv[2]):  # noqa: PTH110
            time.sleep(0.05)
        os._exit(0)
    kill_self()


def crashes_at_exit(execution, context):
    atexit.register(os._exit, 3)


def deaths():
    items = SpawnQueue()
    return {
        "killed": run(partial(dies, partial(leave_child_and_die, os.getpid())), 2, items),
        "exit code": run(partial(dies, partial(os._exit, 0))),
        "sys.exit": run(partial(dies, partial(sys.exit, 4))),
        "at exit": run(crashes_at_exit),
        "items": sorted(drained(items)),
    }


def not_to_be_pickled():
    flag = make_stop_flag()
    return run(partial(puts, lambda: 0, None), flag=flag)


def leaves(folder, execution, context):
    """A rank that has failed is busy with itself until the other one has raised; it still holds the group."""
    net = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
    for owns_group in (False, True):
        ranks = Together(StopRequest(), owns_group=owns_group)
        ranks.wait_for_all()
        has_raised = Path(f"{folder}.{owns_group}")
        if execution.rank == 0:
            ranks.leave()
            while not has_raised.exists():
                time.sleep(0.01)
            continue
        try:
            if owns_group:
                net(torch.ones(1, 2)).sum().backward()
            else:
                ranks.wait_for_all()
        except RuntimeError as error:
            context.queue.put(str(error))
        has_raised.touch()
    return [list(parameter.shape) for parameter in net.parameters()]


def leaving():
    items = SpawnQueue()
    answer = run(partial(leaves, sys.argv[2]), 2, items, timeout_s=900)  # longer than the test may take
    return [answer, drained(items)]


# -- Signals --


def answers_to_flag(execution, context):
    """Wait for the flag; send the parent a first signal from here, and then another one if that is asked for."""
    os.kill(os.getppid(), signal.SIGTERM)
    while context.stop_flag.value == 0:
        time.sleep(0.01)
    context.queue.put(os.getpid())
    return context.stop_flag.value


def sends_twice(execution, context):
    context.queue.put(os.getpid())
    answers_to_flag(execution, context)
    os.kill(os.getppid(), signal.SIGINT)
    wait_forever()


def is_alive(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def signals():
    items = SpawnQueue()
    once = run(answers_to_flag, flag=make_stop_flag(), listens=True)
    twice = run(sends_twice, items=items, listens=True)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    are_back = handlers == [signal.SIG_DFL, signal.default_int_handler]
    return {"once": once, "twice": twice, "are_back": are_back, "alive": is_alive(drained(items)[0])}


def tells_and_waits(path, execution, context):
    with open(f"{path}.{execution.rank}", "w") as file:  # noqa: PTH123
        file.write(f"{os.getpid()}\n")
    wait_forever()


def orphans():
    """Never returns: it is to be killed."""
    run(partial(tells_and_waits, sys.argv[2]), 2)


SCENARIOS = {
    function.__name__: function
    for function in (queues, one_failure, deaths, leaving, not_to_be_pickled, signals, orphans)
}

if __name__ == "__main__":
    torch.save(SCENARIOS[sys.argv[1]](), sys.argv[2])
