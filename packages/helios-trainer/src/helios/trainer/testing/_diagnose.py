"""Choosing which of the differences is the cause, and saying why it came about and what to do."""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from helios.core.rng import preserve_host_rng_state, rekey_host_rngs
from helios.trainer._model import Model
from helios.trainer._plugin import Plugin, is_overridden
from helios.trainer.testing._advice import how_to_keep, kept_whole
from helios.trainer.testing._carried import find_part, is_carried
from helios.trainer.testing._compare import LENGTH, Divergence, differing
from helios.trainer.testing._leaf import Leaf, Snapshot, snapshot_of
from helios.trainer.testing._parts import GENERATORS, parts_in
from helios.trainer.testing._recorder import Phase, Recording, Save, legacy_state
from helios.trainer.testing._report import shortened

# What the trainer puts back itself, after all hooks.
_KEPT_BY_TRAINER = re.compile(
    r"(_loss_items|_running_losses|_val_scores|_test_scores)\b|.*\.(grad|training|requires_grad)$"
)


@dataclass(frozen=True)
class Cause:
    """Why something differs.

    Attributes:
        headline: in a few words.
        advice: lines that say more, and what to do.
    """

    headline: str
    advice: tuple[str, ...]


@dataclass(frozen=True)
class Resume:
    """How a run was resumed: what was there at the checkpoint, and in the new process before the loop.

    Attributes:
        at_save: at the checkpoint.
        recording: of the resumed process.
    """

    at_save: Snapshot
    recording: Recording

    def lost(self) -> list[str]:
        """Return the paths that were not as at the checkpoint when the loop began, and should have been."""
        changed = differing(self.at_save, self.recording.started)
        return [path for path in changed if not _KEPT_BY_TRAINER.match(path)]

    def phase_of_loss(self, path: str) -> str:
        """Return when a path was seen first not to be as at the checkpoint."""
        for phase in ("loaded", "plugins_started"):
            if getattr(self.recording, phase).get(path) != self.at_save.get(path):
                return phase
        return "started"


def resume_of(recording: Recording, saves: list[Save]) -> Resume:
    """Return how a process was resumed; one that found no checkpoint lost nothing."""
    if recording.save is None:
        return Resume(recording.started, recording)
    return Resume(saves[recording.save].snapshot, recording)


def primary_path(divergence: Divergence, resume: Resume) -> str:
    """Return which of the paths that differ to show: one that was lost in the resume, if there is any."""
    paths, recording = [*divergence.leaves, *divergence.effects], resume.recording
    lost = set(resume.lost())
    if _is_data(
        paths[0], divergence
    ):  # nothing but a plug-in that processes it can have made another batch of it
        makers = [p for p in recording.plugins if is_overridden(p, "process_training_batch")]
        lost = {path for path in lost if any(path.startswith(f"plugins.{p.plug_id}.") for p in makers)}
    suspects = [path for path in paths if path in lost]
    if not suspects:
        return paths[0]
    return min(suspects, key=lambda path: _rank(recording, path))


def _is_data(path: str, divergence: Divergence) -> bool:
    """Say whether a path is of the batch; a model may have an attribute of that name too."""
    is_of_batch = path == "sample order" or re.match(r"batch\b", path) is not None
    return is_of_batch and divergence.moment_of(path).phase is Phase.BATCH


def _rank(recording: Recording, path: str) -> int:
    """Return 0 for what has a `state_dict` and for generators; plain attributes may only be consequences."""
    owner, prefix = _owner_of(recording, path)
    part = find_part(owner, path, prefix)
    if part is None:
        return 3
    if isinstance(part.value, GENERATORS):
        return 0
    if part.owner is not None:
        return 0 if not isinstance(part.owner, nn.Module) else 1
    return 2


def _owner_of(recording: Recording, path: str) -> tuple[Model | Plugin, str]:
    for plugin in recording.plugins:
        if path.startswith(prefix := f"plugins.{plugin.plug_id}."):
            return plugin, prefix
    return recording.model, ""


def cause_in_resume(path: str, divergence: Divergence, resume: Resume) -> Cause:
    """Say why a path differs in a run that was resumed, though the run from the beginning equals itself."""
    recording = resume.recording
    if _is_data(path, divergence):
        return _cause_in_data(path, recording, divergence)
    if path in resume.lost():
        cause = _cause_of_loss(path, resume)
        return replace(cause, advice=(*cause.advice, *_how_to_ignore(recording, divergence)))
    if recording.legacy_moved:
        return _legacy_cause(", ".join(sorted(recording.legacy_moved)))
    if path == LENGTH:
        headline = "the resumed run decides otherwise when to validate or to stop"
    else:
        headline = "it was as at the checkpoint when the loop began"
    lost = resume.lost()
    if lost:
        return Cause(
            f"{headline}; {lost[0]} was not",
            (f"These were not as at the checkpoint when the loop began: {shortened(tuple(lost))}.",),
        )
    return Cause(
        headline,
        (
            "So it depends on state that is in no attribute of the model and of the plug-ins: in the DataModule, a",
            "global variable, a closure, an object with __slots__, a file. Keep it in an attribute of the model, and",
            "in Model.state_dict.",
        ),
    )


def _cause_of_loss(path: str, resume: Resume) -> Cause:
    recording = resume.recording
    owner, prefix = _owner_of(recording, path)
    kind = "Model" if isinstance(owner, Model) else "Plugin"
    name, phase = type(owner).__name__, resume.phase_of_loss(path)
    values = _how_it_changed(resume.at_save.get(path), getattr(recording, phase).get(path))
    if phase != "loaded":
        whose = f"{recording.model.__class__.__name__}'s" if phase == "started" else "a plug-in's"
        return Cause(
            f"changed by {whose} on_training_start",
            (
                values,
                "on_training_start is called in every process, after a resume with the state restored: give it its",
                "first value in setup.",
            ),
        )
    part = find_part(owner, path, prefix)
    if part is not None and is_carried(owner, part):
        return Cause(
            f"in {kind}.state_dict, but not put back by load_state_dict",
            (values, f"{name}.state_dict() has it, but {name}.load_state_dict(state) did not put it back."),
        )
    advice = how_to_keep(part, prefix) if part is not None else ()
    return Cause(f"not in {kind}.state_dict", (values, *_in_class(name, advice)))


def _how_to_ignore(recording: Recording, divergence: Divergence) -> tuple[str, ...]:
    """Return how to leave out what differs, if that is plain attributes and nothing that may be trained."""
    names: dict[str, None] = {}
    for path in (*divergence.leaves, *divergence.effects):
        owner, prefix = _owner_of(recording, path)
        part = find_part(owner, path, prefix)
        if part is None or part.owner is not None or isinstance(part.value, (torch.Tensor, *GENERATORS)):
            return ()
        names[kept_whole(part).path] = None
    ignored = " ".join(f'"{name}",' for name in names)
    return (
        "Nothing that is trained differs by then. If it is only measured, and changes nothing, leave it out:",
        f"check_resume(..., ignore=({ignored})).",
    )


def _how_it_changed(at_save: Leaf | None, later: Leaf | None) -> str:
    before, after = ("not there" if leaf is None else leaf.text for leaf in (at_save, later))
    if before is None or after is None:
        return "After the resume it was not what it had been at the checkpoint."
    return f"At the checkpoint it was {before}, after the resume {after}."


def _in_class(name: str, advice: tuple[str, ...]) -> tuple[str, ...]:
    if not advice:
        return (f"Nothing keeps it: make it in {name}.setup, and have it in {name}.state_dict.",)
    return (f"Nothing keeps it. In {name}:", *advice)


def _cause_in_data(path: str, recording: Recording, divergence: Divergence) -> Cause:
    if path == "sample order":
        return Cause(
            "the loader gives other samples",
            (
                "The order has to be a function of seed and epoch: does a sampler of your own keep something else?",
            ),
        )
    verdict = probe(recording.train_loader, divergence)
    if verdict == "legacy" or (verdict is None and "while a batch was fetched" in recording.legacy_moved):
        return _legacy_cause("while a sample was fetched")
    if verdict == "other":
        return Cause(
            "a sample is another each time it is fetched",
            (
                "torch, random and NumPy's default generator stood the same both times, so the dataset, or a transform",
                "in it, has a generator or a counter of its own, which no checkpoint has. Draw from torch or random",
                "instead: they are put at the place that belongs to a sample before it is fetched.",
            ),
        )
    return Cause(
        "the samples are the same, but not what was made of them",
        (
            "A generator or a counter in the dataset, in collate_fn or in a plug-in's process_training_batch is",
            "probable: NumPy's legacy one (np.random.*) in workers, for example. Draw from torch or random instead.",
        ),
    )


def _legacy_cause(when: str) -> Cause:
    return Cause(
        "drawn from NumPy's legacy generator (np.random.*)",
        (
            f"It was used {when}. fit neither seeds it nor saves it, and torch seeds it anew in every worker.",
            "Instead of np.random.rand() use torch.rand(()), random.random(), or",
            "helios.core.rng.get_default_numpy_rng().generator.random(): they are seeded, saved, and put at the place",
            "that belongs to a sample before it is fetched.",
        ),
    )


def probe(loader: Any, divergence: Divergence) -> str | None:
    """Fetch a sample twice, with the generators at the same place, in this process.

    Returns:
        "legacy" if that moves NumPy's legacy generator, "other" if the samples differ all the same, "same" if they do
        not, None if it could not be done.
    """
    index = (loader.last_indices or [0])[0]
    with preserve_host_rng_state():
        try:
            before = legacy_state()
            samples = []
            for _ in range(2):
                rekey_host_rngs(bytes(32))
                samples.append(snapshot_of(parts_in("sample", loader.dataset[index])))
        except Exception:  # whatever a dataset may raise in another process than its worker
            return None
        if legacy_state() != before:
            return "legacy"
        return "same" if samples[0] == samples[1] else "other"


def cause_without_resume(path: str, recording: Recording, divergence: Divergence) -> Cause:
    """Say why two runs from the beginning differ."""
    if _is_data(path, divergence) and path != "sample order":
        cause = _cause_in_data(path, recording, divergence)
        if "samples are the same" not in cause.headline:
            return cause
    elif recording.legacy_moved:
        return _legacy_cause(", ".join(sorted(recording.legacy_moved)))
    return BY_ITSELF


BY_ITSELF = Cause(
    "the run is not deterministic by itself",
    (
        "Something reads the clock, draws from a generator that nobody seeded, or depends on an earlier run in the",
        "same process; or a kernel is not deterministic: Trainer(enable_deterministic=True). What is only measured,",
        "and changes nothing, can be left out by its path: check_resume(..., ignore=(...)).",
    ),
)
