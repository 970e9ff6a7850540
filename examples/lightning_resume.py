"""Train inside Lightning, and go on exactly where a kill left the run.

    python examples/lightning_resume.py --root runs/lightning [--workers N] [--die-at STEP]

Kill it whenever you like (`--die-at` does it for you) and start it again with the same command, or with another
number of workers: it prints the digest of a run that was never killed.
"""

import argparse
import hashlib
import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn

from helios.core.rng import get_rng_state_dict, load_rng_state_dict, seed_rngs
from helios.data import create_dataloader


class Noisy(torch.utils.data.Dataset):
    """Points that are disturbed anew whenever they are looked at."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), index / 100) + torch.rand(4)


class Model(pl.LightningModule):
    """A small network with dropout, which saves checkpoints and keeps the generators in them."""

    def __init__(self, path: Path, die_at: int | None) -> None:
        super().__init__()
        self.path, self.die_at, self.generators = path, die_at, None
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.net(batch).squeeze(1) - batch.sum(1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["generators"] = get_rng_state_dict()  # dropout draws from them, and Lightning forgets them

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.generators = checkpoint["generators"]

    def on_train_batch_start(self, *_) -> None:
        if self.generators is not None:  # only now: validation with torch's DataLoader draws before this
            load_rng_state_dict(self.generators)
            self.generators = None

    def on_train_batch_end(self, *_) -> None:
        # Not after an epoch's last batch: Lightning miscounts the epochs of a run that goes on from there.
        if self.global_step % 5 == 0 and not self.trainer.is_last_batch:
            self.trainer.save_checkpoint(self.path)
        if self.global_step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--die-at", type=int)
    options = parser.parse_args()
    seed_rngs(0)
    model = Model(options.root / "last.ckpt", options.die_at)
    loader = create_dataloader(Noisy(), batch_size=8, shuffle=True, num_workers=options.workers)
    trainer = pl.Trainer(max_epochs=3, accelerator="cpu", enable_checkpointing=False, logger=False)
    trainer.fit(model, loader, ckpt_path=model.path if model.path.exists() else None)
    weights = b"".join(weight.detach().numpy().tobytes() for weight in model.parameters())
    print("digest", hashlib.sha256(weights).hexdigest())
