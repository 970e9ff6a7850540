"""A note beside the checkpoints of a run that has none of its own yet: where it writes its logs.

A run that is killed before its first checkpoint starts again from the beginning, or from the checkpoint of an earlier
release. It must go on in the same log file and TensorBoard folder, or its scalars would be there twice. The note is
gone once there is a checkpoint, or when the run ends in any way but being killed, which of several ranks is unknown.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios.trainer.logging._places import LogTargets


@dataclass(frozen=True)
class Start:
    """Where a killed run wrote.

    Attributes:
        targets: log file and TensorBoard folder.
        event_sizes: sizes that TensorBoard's files had when it started; what they have beyond is to be purged.
    """

    targets: LogTargets
    event_sizes: dict[str, int]


class StartNote:
    """The note of a run.

    Args:
        root: folder of the checkpoints.
        run_name: name of the run.
        settings: what must be the same for a start to be the same run, as JSON values.
    """

    def __init__(self, root: Path, run_name: str, settings: dict[str, Any]) -> None:
        self._path = root / f".{run_name}.start.json"
        self._settings = settings

    def read(self, origin: str | None) -> Start | None:
        """Return where a killed run with these settings wrote, or None if there was none.

        Args:
            origin: name of the checkpoint that it started from, None if from the beginning.
        """
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            note = json.loads(self._path.read_text(encoding="utf-8"))
            if note["settings"] == self._settings and note.get("origin") == origin:
                return Start(LogTargets.from_dict(note), dict(note.get("event_sizes", {})))
        return None

    def write(self, origin: str | None, start: Start) -> None:
        """Note where a run writes that starts from `origin`."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        note = {
            "settings": self._settings,
            "origin": origin,
            "event_sizes": start.event_sizes,
            **start.targets.to_dict(),
        }
        temp = self._path.with_suffix(".tmp")
        temp.write_text(json.dumps(note), encoding="utf-8")
        temp.replace(self._path)

    def remove(self) -> None:
        """Remove the note, if it is there."""
        self._path.unlink(missing_ok=True)
