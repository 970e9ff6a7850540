"""Train a small transformer to write, character by character, as the manual of Python does.

    python examples/characters.py --root runs/characters

The text comes with Python: what `help("assert")` and its like print. Kill it whenever you like (`--die-at` does
it for you) and start it again with the same command: it goes on where its last checkpoint stands, and prints
the digest and the text of a run that was never killed.
"""

import argparse
import hashlib
import math
import os
import signal
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from helios.data import DataLoaderParams, DataModule
from helios.trainer import CUDAPlugin, Model, Trainer, TrainingState, TrainingUnit
from helios.trainer.logging import get_root_logger, get_tensorboard_writer

TEXT = "\n\n".join(topics[name] for name in sorted(topics))
ALPHABET = sorted(set(TEXT))
CONTEXT = 64  # characters that the network sees
ACCUMULATION = 2  # batches whose gradients make a step


class Windows(torch.utils.data.Dataset[torch.Tensor]):
    """Pieces of CONTEXT + 1 characters, as their places in the alphabet; shifted at random if `shift` is set."""

    def __init__(self, text: str, shift: bool) -> None:
        places = {character: place for place, character in enumerate(ALPHABET)}
        self._codes = torch.tensor([places[character] for character in text])
        self._shift = shift

    def __len__(self) -> int:
        return len(self._codes) // CONTEXT - 1

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * CONTEXT
        if self._shift:
            start += int(torch.randint(CONTEXT, ()))
        return self._codes[start : start + CONTEXT + 1]


class ManualData(DataModule):
    """The last twentieth of the text to validate on, the rest to train on."""

    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self._num_workers = num_workers

    def setup(self) -> None:
        end = len(TEXT) * 19 // 20
        params = DataLoaderParams(batch_size=16, shuffle=True, num_workers=self._num_workers)
        self._train_dataset = self._create_dataset(Windows(TEXT[:end], shift=True), params)
        self._valid_dataset = self._create_dataset(Windows(TEXT[end:], shift=False), {"batch_size": 32})


class Block(nn.Module):
    """Attention to the characters before, then a layer for each character."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, time, width) to the same."""
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.out(seen.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class Transformer(nn.Module):
    """Tells from characters how likely each is to come next."""

    def __init__(self, width: int = 64, num_heads: int = 4, num_blocks: int = 2) -> None:
        super().__init__()
        self.character = nn.Embedding(len(ALPHABET), width)
        self.place = nn.Parameter(torch.empty(CONTEXT, width))
        for table in (self.character.weight, self.place):
            nn.init.normal_(table, std=0.1)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(num_blocks)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(ALPHABET)))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Map codes (batch, time) to logits (batch, time, alphabet)."""
        x = self.character(codes) + self.place[: codes.shape[1]]
        logits: torch.Tensor = self.head(self.blocks(x))
        return logits


class Writer(Model):
    """The transformer with AdamW, a cosine schedule after a warm-up, bfloat16 and clipped gradients."""

    def __init__(self, num_steps: int, die_at: int | None) -> None:
        super().__init__("characters")
        self._num_steps = num_steps
        self._die_at = die_at

    def setup(self, fast_init: bool = False) -> None:
        self.net = self.distribute(Transformer())
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2, betas=(0.9, 0.99))
        warm_up = max(1, self._num_steps // 10)

        def factor(step: int) -> float:
            progress = (step - warm_up) / max(1, self._num_steps - warm_up)
            return (step + 1) / warm_up if step < warm_up else 0.5 * (1 + math.cos(math.pi * progress))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.best = math.inf

    def state_dict(self) -> dict[str, Any]:
        return self.save_all(**self._parts(), best=self.best)

    def load_state_dict(self, state: dict[str, Any], fast_init: bool = False) -> None:
        self.best = self.load_all(state, **self._parts())["best"]

    def _parts(self) -> dict[str, Any]:
        return {"net": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def _loss(self, codes: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            logits = self.net(codes[:, :-1])
        return functional.cross_entropy(logits.float().flatten(0, 1), codes[:, 1:].flatten())

    def train_step(self, batch: Any, state: TrainingState) -> None:
        loss = self._loss(batch)
        (loss / ACCUMULATION).backward()
        self._loss_items["loss"] = loss
        if state.global_iteration % ACCUMULATION == 0:
            self._norm = self.clip_gradients(self.net, max_norm=1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()  # after the step, not before: a checkpoint then holds no used gradients
            self.scheduler.step()

    def on_training_batch_end(self, state: TrainingState, should_log: bool = False) -> None:
        super().on_training_batch_end(state, should_log)
        writer = get_tensorboard_writer()
        if should_log and writer is not None:
            writer.add_scalar("train/loss", self._loss_items["loss"], state.current_iteration)
            writer.add_scalar("train/norm of the gradients", self._norm, state.current_iteration)
            writer.add_scalar("train/lr", self.scheduler.get_last_lr()[0], state.current_iteration)
        if state.global_iteration == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_validation_start(self, validation_cycle: int) -> None:
        super().on_validation_start(validation_cycle)
        self._sum, self._count = 0.0, 0

    def valid_step(self, batch: Any, step: int) -> None:
        self._sum += float(self._loss(batch)) * len(batch)
        self._count += len(batch)

    def on_validation_end(self, validation_cycle: int) -> None:
        self._val_scores["loss"] = loss = self._sum / self._count
        get_root_logger().info("validation %d: loss %.4f", validation_cycle, loss)
        writer = get_tensorboard_writer()
        if writer is not None:
            writer.add_scalar("valid/loss", loss, validation_cycle)
        super().on_validation_end(validation_cycle)

    def have_metrics_improved(self) -> bool:
        loss, before = self._val_scores["loss"], self.best
        self.best = min(loss, before)
        return bool(loss < before)

    @torch.no_grad()
    def write(self, num_characters: int, beginning: str = "The ") -> str:
        """Return text that the network makes up; the same whenever it is asked."""
        self.eval()
        generator = torch.Generator().manual_seed(0)
        codes = [ALPHABET.index(character) for character in beginning]
        while len(codes) < num_characters:
            logits = self.net(torch.tensor([codes[-CONTEXT:]], device=self.device))[0, -1]
            chances = functional.softmax(logits.float().cpu() / 0.7, dim=0)
            codes.append(int(torch.multinomial(chances, 1, generator=generator)))
        return "".join(ALPHABET[code] for code in codes)

    def digest(self) -> str:
        """Return a digest of every bit of the weights."""
        weights = [weight.cpu().numpy().tobytes() for weight in self.net.state_dict().values()]
        return hashlib.sha256(b"".join(weights)).hexdigest()


def main() -> None:
    """Train, or go on training, then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/characters"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=600, help=f"steps, each of {ACCUMULATION} batches")
    parser.add_argument("--workers", type=int, default=1, help="loader processes; may differ at a restart")
    parser.add_argument("--die-at", type=int, metavar="BATCH", help="batch after which to kill itself")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # the network is tiny; the other cores are for the workers
    steps, root = arguments.steps, arguments.root
    trainer = Trainer(
        train_unit=TrainingUnit.ITERATION,
        total_steps=steps,
        accumulation_steps=ACCUMULATION,
        valid_frequency=max(1, steps // 6),
        early_stop_cycles=2,
        print_frequency=max(1, steps // 60),
        chkpt_frequency=max(1, steps // 20),
        keep_last=2,
        enable_deterministic=True,
        enable_progress_bar=True,
        enable_tensorboard=True,
        enable_file_logging=True,
        chkpt_root=root / "checkpoints",
        run_path=root / "tensorboard",
        log_path=root / "logs",
    )
    trainer.plugins.append(CUDAPlugin())
    model = Writer(steps, arguments.die_at)
    if trainer.fit(model, ManualData(arguments.workers)):
        print(f"validation loss: {model.metrics['loss']:.4f}, the best was {model.best:.4f}")
        print("digest", model.digest())
        print(model.write(400))


if __name__ == "__main__":
    main()
