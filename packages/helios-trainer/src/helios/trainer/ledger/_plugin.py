"""Ledger: the plug-in that keeps one."""

import os
from pathlib import Path
from typing import Any

import torch

from helios.data import ResumableDataLoader
from helios.trainer._digest import digest
from helios.trainer._model import Model
from helios.trainer._plugin import Plugin
from helios.trainer._training_state import TrainingState
from helios.trainer.ledger._components import generators, losses, optimizers, weights
from helios.trainer.ledger._file import LedgerFile, Mark
from helios.trainer.ledger._format import FORMAT, HEADER_KEY


class Ledger(Plugin):
    """Writes a line for every training step: digests of what the step began with, and its losses.

    A step is a batch. Each is in the file exactly once, however often the run is killed and started again: what came
    after the checkpoint that it goes on from is cut off, and written anew. A run that begins from the beginning begins
    the file anew. Nothing is drawn from a generator, and the run ends with the same bits as without a ledger.

    Losses, and digests of weights and of batches that are on a device, wait for it. A rehearsal
    (`Trainer(dry_run=...)`) makes the digests, and writes nothing.

    Args:
        path: the file; its folder is made if need be.
        weights_every: steps between digests of weights and of optimizers, from the first step on. They cost about a
            second for each GB, and 40 bytes of the file for each parameter.
        plug_id: id of the plug-in.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `weights_every` is less than 1, or `plug_id` is not allowed.
    """

    def __init__(
        self, path: str | os.PathLike[str], weights_every: int = 100, plug_id: str = "ledger"
    ) -> None:
        super().__init__(plug_id)
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path must be a path, found {type(path).__name__} {path!r}")
        if not isinstance(weights_every, int) or isinstance(weights_every, bool):
            raise TypeError(
                f"weights_every must be an int, found {type(weights_every).__name__} {weights_every!r}"
            )
        if weights_every < 1:
            raise ValueError(f"weights_every must be at least 1, found {weights_every}")
        self.path = Path(path)
        self.weights_every = weights_every
        self._restored: dict[str, Any] | None = None
        self._file: LedgerFile | None = None
        self._mark_at_end: Mark | None = None
        self._place = {"step": 0, "epoch": 0}  # of the last row
        self._began_with: dict[str, Any] = {}  # the row in progress

    def configure_loaders(
        self, train_loader: ResumableDataLoader, valid_loader: ResumableDataLoader | None
    ) -> None:
        """Take note of the training loader, which knows the ids."""
        self._loader = train_loader

    def setup(self) -> None:
        """Forget the run before."""
        self._restored = self._file = self._mark_at_end = None
        self._place = {"step": 0, "epoch": 0}

    def configure_model(self, model: Model) -> None:
        """Take note of the model."""
        self._model = model

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take note of where to go on. Tests load a state too, so the file is left alone."""
        self._restored = state

    def on_training_start(self) -> None:
        """Open the file: cut back to the checkpoint, or anew. With several ranks, the file is of rank 0.

        Raises:
            LedgerError: it is not the file that it should be.
            OSError: it cannot be opened, or begun.
        """
        if self.trainer.settings.dry_run is not None or self.trainer.rank > 0:
            return
        if self._restored is None:
            self._file = LedgerFile.begin(self.path, self._header())
        else:
            way_out = (
                f"Put it back; or go on with a new one from here: Ledger(another path, plug_id='{self.plug_id}2') with "
                f"Trainer(accept_on_resume=['{self.plug_id}2'])"
            )
            self._place = self._restored["place"]
            self._file = LedgerFile.go_on(self.path, Mark(**self._restored["mark"]), way_out)
        self._restored = None

    def _header(self) -> dict[str, Any]:
        settings = self.trainer.settings
        begun_with = {
            **settings.decisive(),
            "weights_every": self.weights_every,
            "device": self._model.device.type,
            "torch": str(torch.__version__),
        }
        return {
            HEADER_KEY: FORMAT,
            "run": settings.run_name or self._model.save_name,
            "begun_with": begun_with,
        }

    def observe_training_batch(self, batch: Any, state: TrainingState) -> None:
        """Take the digests of what the step begins with."""
        ids = self._loader.last_indices
        self._place = {"step": state.global_iteration, "epoch": state.global_epoch}
        self._began_with = {
            "ids": None if ids is None else digest(ids),
            "batch": digest(batch),
            "rng": generators(),
        }
        if (state.global_iteration - 1) % self.weights_every == 0:
            self._began_with |= self._weights()

    def _weights(self) -> dict[str, Any]:
        return {"weights": weights(self._model), "optimizers": optimizers(self._model)}

    def observe_training_step(self, state: TrainingState) -> None:
        """Write the step's row."""
        row = {**self._place, "losses": losses(self._model), **self._began_with}
        if self._file is not None:
            self._file.append(row)

    def on_training_end(self) -> None:
        """Write the last row: what training ended with, before the model's `on_training_end`.

        Raises:
            OSError: rows still wait that cannot be written. The run can be started again when they can.
        """
        row = {**self._place, "end": True, "rng": generators(), **self._weights()}
        if self._file is not None:
            # A run that is given more steps goes on from before this row, as one that had them at once.
            self._mark_at_end = self._file.mark()
            self._file.append(row)
            self._file.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return where the file stands; all of it until there is on the disk."""
        if self._file is None:
            return {}
        mark = self._mark_at_end or self._file.mark()
        return {"mark": mark.to_dict(), "place": self._place}
