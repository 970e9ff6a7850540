"""Train with Accelerate, and go on exactly where a kill left the run.

    python examples/accelerate_resume.py --root runs/accelerate [--workers N] [--die-at STEP]

Kill it whenever you like (`--die-at` does it for you) and start it again with the same command, or with another
number of workers: it prints the digest of a run that was never killed.
"""

import argparse
import hashlib
import os
import shutil
import signal
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from helios.data import create_dataloader


class Noisy(torch.utils.data.Dataset):
    """Points that are disturbed anew whenever they are looked at."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), index / 100) + torch.rand(4)


def find_last(root: Path) -> Path | None:
    """Return the folder of the last state that was saved completely, or None."""
    return max(root.glob("step_*"), key=lambda path: int(path.name[5:]), default=None)


def save(accelerator: Accelerator, root: Path, step: int) -> None:
    """Save the state; a kill meanwhile leaves the one before it."""
    previous, unfinished = find_last(root), root / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.save_state(unfinished)
    unfinished.rename(root / f"step_{step}")
    if previous is not None:
        shutil.rmtree(previous)


def main(root: Path, workers: int, die_at: int | None) -> None:
    """Train for three epochs, from the last state on."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    # In several processes: is_distributed=True. On a GPU: batch.to(accelerator.device).
    loader = create_dataloader(Noisy(), batch_size=8, shuffle=True, num_workers=workers)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if (last := find_last(root)) is not None:
        accelerator.load_state(last)
    step = 0 if last is None else int(last.name[5:])
    while loader.epoch < 3:
        for batch in loader:
            loss = (model(batch).squeeze(1) - batch.sum(1)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 5 == 0:
                save(accelerator, root, step)
            if step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
    weights = b"".join(weight.detach().numpy().tobytes() for weight in model.parameters())
    print("digest", hashlib.sha256(weights).hexdigest())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--die-at", type=int)
    main(**vars(parser.parse_args()))
