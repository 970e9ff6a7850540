"""Finding what a run goes on from."""

import platform
from pathlib import Path
from typing import Any

from helios.chkpt import CheckpointError, inspect, load, load_last_checkpoint, parse_name
from helios.trainer._earlier import EarlierResumption, is_earlier, say_where_others_are
from helios.trainer._model import Model
from helios.trainer._ranks import Ranks
from helios.trainer._resumption import Resumption
from helios.trainer._settings import TrainerSettings


def find_checkpoint(
    root: Path | None, run_name: str, model: Model, ranks: Ranks
) -> tuple[Path, dict[str, Any]] | None:
    """Return path and content of the last good checkpoint of a run, on the model's device; or None.

    Tensors of which each rank has a part are left out: where they go is known when the model is set up. Rank 0 looks
    for it, all read it.

    Raises:
        FileNotFoundError: this rank does not see what rank 0 found.
    """
    if root is None:
        return None
    found: list[tuple[Path, dict[str, Any]]] = []
    types = model.types_for_safe_load()
    options: dict[str, Any] = {"map_location": model.map_loc, "safe_types": types, "shards": False}

    def find() -> Path | None:
        last = load_last_checkpoint(root, run_name, **options)
        found.extend([] if last is None else [last])
        return None if last is None else last[0]

    path = ranks.on_first(find)
    if path is not None and not found:
        try:
            found.append((path, load(path, **options)))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                error.errno,
                f"rank {ranks.rank} on {platform.node()} does not see the checkpoint that rank 0 goes on from: "
                "chkpt_root must be a folder that all machines of a run share",
                str(path),
            ) from error
    return found[0] if found else None


def find_resumption(
    settings: TrainerSettings, run_name: str, model: Model, ranks: Ranks
) -> Resumption | None:
    """Return the last good checkpoint of a run, ready to go on from, or None if the run has none at all.

    Raises:
        ValueError: it has some, but none can be read or is whole; or the one found does not fit.
    """
    root = settings.chkpt_root
    if root is None:
        return None
    found = find_checkpoint(root, run_name, model, ranks)
    if found is None:
        ranks.on_first(lambda: _check_is_new(root, run_name, model))
        return None
    path, checkpoint = found
    if is_earlier(checkpoint):
        return EarlierResumption(path, checkpoint, ranks, settings)
    return Resumption(path, checkpoint, ranks, settings.accept_on_resume)


def _check_is_new(root: Path, run_name: str, model: Model) -> None:
    paths = root.iterdir() if root.is_dir() else ()
    there = [path for path in paths if (name := parse_name(path.name)) and name.run_name == run_name]
    there = [path for path in there if not _is_unfinished(path)]  # of a run that was killed in its first save
    if there:  # to begin anew would replace them, and with keep_last delete them
        raise ValueError(
            f"run {run_name} has {len(there)} checkpoints in {root}, and none is good: see the warnings "
            "before this. Repair one, or move them away to begin anew"
        )
    say_where_others_are(root, run_name, model.save_name)


def _is_unfinished(path: Path) -> bool:
    """Whether a checkpoint of several files lacks the one that is written last."""
    try:
        inspect(path)
    except FileNotFoundError:
        return True
    except (CheckpointError, OSError):
        pass
    return False
