"""Finding what a run goes on from."""

from pathlib import Path
from typing import Any

from helios.chkpt import load_last_checkpoint, parse_name
from helios.trainer._checkpoint import Resumption
from helios.trainer._earlier import EarlierResumption, is_earlier, say_where_others_are
from helios.trainer._model import Model
from helios.trainer._settings import TrainerSettings


def find_checkpoint(root: Path | None, run_name: str, model: Model) -> tuple[Path, dict[str, Any]] | None:
    """Return path and content of the last good checkpoint of a run, on the model's device; or None."""
    if root is None:
        return None
    types = model.types_for_safe_load()
    return load_last_checkpoint(root, run_name, map_location=model.map_loc, safe_types=types)


def find_resumption(settings: TrainerSettings, run_name: str, model: Model) -> Resumption | None:
    """Return the last good checkpoint of a run, ready to go on from, or None if the run has none at all.

    Raises:
        ValueError: it has some, but none can be read or is whole; or the one found does not fit.
    """
    root = settings.chkpt_root
    if root is None:
        return None
    found = find_checkpoint(root, run_name, model)
    if found is None:
        there = [
            path
            for path in root.glob("*.pth")
            if (name := parse_name(path.name)) and name.run_name == run_name
        ]
        if there:  # to begin anew would replace them, and with keep_last delete them
            raise ValueError(
                f"run {run_name} has {len(there)} checkpoints in {root}, and none is good: see the warnings "
                "before this. Repair one, or move them away to begin anew"
            )
        say_where_others_are(root, run_name, model.save_name)
        return None
    path, checkpoint = found
    if is_earlier(checkpoint):
        return EarlierResumption(path, checkpoint, settings)
    return Resumption(path, checkpoint, settings.accept_on_resume)
