"""TensorBoard's event files: how long they were at a checkpoint, and cutting them back to that.

Scalars are logged under whatever step the user likes (iterations, epochs, validations), so TensorBoard's own
purging by step number cannot tell what came after a checkpoint. The length of the files can.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path


def event_file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every event file below a run's folder, by path relative to it."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in _event_files(folder)}


def purge_events(folder: Path, sizes: Mapping[str, int]) -> None:
    """Cut the event files below a run's folder back to the sizes they had; remove those that came later."""
    for path in _event_files(folder):
        size = sizes.get(str(path.relative_to(folder)))
        if size is None:
            path.unlink()
        elif path.stat().st_size > size:
            os.truncate(path, size)


def _event_files(folder: Path) -> Iterator[Path]:
    # Sub-folders too: SummaryWriter.add_scalars makes one for each of its curves.
    return (path for path in sorted(folder.rglob("events.out.tfevents.*")) if path.is_file())
