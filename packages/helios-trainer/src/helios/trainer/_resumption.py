"""Putting a run back into a checkpoint."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from helios.chkpt import load_sharded, parse_name
from helios.core.rng import RNGStateError, derive_seed, load_rng_state_dict, seed_rngs
from helios.data import LoaderStateError, ResumableDataLoader
from helios.trainer._checkpoint import noted
from helios.trainer._loop import Cut, CutPoint, StopReason, cut_from_dict
from helios.trainer._model import Model, restore_tables
from helios.trainer._modules import restore_buffers, restore_frozen, restore_gradients, restore_training_modes
from helios.trainer._plugin import RESERVED_KEYS, PluginRegistry, is_overridden
from helios.trainer._rank_state import average_of_ranks, overlaid
from helios.trainer._ranks import Ranks
from helios.trainer._replicas import meshes_of, restore_unsynchronised
from helios.trainer._reshard import taking_other_shards
from helios.trainer._settings import TrainerSettings
from helios.trainer._training_state import TrainingState
from helios.trainer.logging import get_root_logger
from helios.trainer.logging._places import LogTargets

_ALWAYS = ("training_state", "model", "rng", "data")
_OWN = ("cut", "stop", "settings", "tables", "gradients", "modes", "event_sizes")


class Resumption:
    """A checkpoint that a run goes on from, checked.

    Args:
        path: where it was read from.
        checkpoint: what it holds, without the tensors of which each rank has a part.
        ranks: this process among those of the run.
        accepted: settings that may differ, and parts that may be missing; see `Trainer`.

    Attributes:
        path: as given.
        state: the counters.
        cut: where in the loop it was taken.
        stop: why training had ended, or None if it had not.
        event_sizes: sizes of TensorBoard's files at the checkpoint.
        is_earlier: an earlier release of Helios began the run.

    Raises:
        ValueError: it lacks a part.
    """

    is_earlier = False

    def __init__(
        self, path: Path, checkpoint: dict[str, Any], ranks: Ranks, accepted: Collection[str] = ()
    ) -> None:
        self.path = path
        self._ranks = ranks
        self._accepted = accepted
        self._is_reseeded = False  # another seed is accepted: the old generators are not put back
        for key in _ALWAYS:
            if key not in checkpoint:
                found = f"{path} lacks {key!r}, which a run needs to go on; it has {sorted(checkpoint)}"
                if key not in ("rng", "data"):
                    raise ValueError(found)
                self._accept(key, found)
        self._checkpoint = checkpoint
        self._own: dict[str, Any] = {}
        self.state, self.cut, self.stop, self.event_sizes = self._read()
        self._world_size: int = self._own.get("world_size", 1)  # which 0.2 did not write
        self._others: list[dict[str, Any]] = self._own.get("ranks", [])

    def _read(self) -> tuple[TrainingState, Cut, StopReason | None, dict[str, int]]:
        """Return the attributes of those names."""
        state = TrainingState.from_dict(self._checkpoint["training_state"])
        self._own, state.trainer = state.trainer, {}
        lost = [key for key in _OWN if key not in self._own]
        if lost:
            raise ValueError(
                f"{self.path} lacks {lost[0]!r} in training_state['trainer'], which a run needs to go on: another "
                "release of helios-trainer wrote it"
            )
        name, counted = parse_name(self.path.name), (state.global_epoch, state.global_iteration)
        if name is not None and counted != (name.epoch, name.iteration):
            raise ValueError(
                f"{self.path} was written in epoch {counted[0]}, at iteration {counted[1]}: it has the name of another "
                "checkpoint, by which it is found. Give it back its own, or take it away"
            )
        stop = None if self._own["stop"] is None else StopReason[self._own["stop"]]
        return state, cut_from_dict(self._own["cut"]), stop, self._own["event_sizes"]

    def _accept(self, name: str, found: str, error: Exception | None = None) -> None:
        """Go on with a warning if the user accepted this before.

        Raises:
            ValueError: it is not accepted.
        """
        if name not in self._accepted:
            raise ValueError(f"{found}; to go on all the same: accept_on_resume=[{name!r}]") from error
        get_root_logger().warning("%s. The run goes on all the same: accept_on_resume has %r", found, name)

    def check_settings(self, settings: TrainerSettings) -> None:
        """Refuse to go on with settings that would make another run of it.

        Raises:
            ValueError: a decisive setting differs, and that is not accepted.
        """
        for name, now in settings.decisive().items():
            then = self._own["settings"].get(name)
            if now != then:
                self._accept(
                    name,
                    f"{self.path} was written with {name}={then}, this trainer has {name}={now}: the run would "
                    "not go on but become another. Use the old value, or another run_name or chkpt_root",
                )
                self._is_reseeded |= name == "random_seed"

    def check_plugins(self, plugins: PluginRegistry) -> None:
        """Refuse to go on if a plug-in's state is missing.

        Raises:
            ValueError: the checkpoint has no state of a plug-in that keeps one, and that is not accepted.
        """
        if unknown := sorted(self._plug_ids() - set(plugins)):
            get_root_logger().warning(
                "%s has state under %s, which is no plug-in of this trainer: the run goes on without it",
                self.path,
                ", ".join(unknown),
            )
        for plug_id, plugin in plugins.items():
            if plug_id not in self._checkpoint and is_overridden(plugin, "state_dict"):
                self._accept(
                    plug_id,
                    f"{self.path} has no state of the plug-in {plug_id!r}: it was not part of the run",
                )

    def _plug_ids(self) -> set[str]:
        return set(self._checkpoint) - RESERVED_KEYS

    def targets(self) -> LogTargets:
        """Return where the run wrote."""
        return LogTargets.from_dict(self._checkpoint)

    def restore_loader(self, loader: ResumableDataLoader) -> None:
        """Put the training loader where it stood; or at the beginning of the epoch, if that is accepted.

        Raises:
            ValueError: the state does not fit the loader, and that is not accepted.
        """
        if "data" in self._checkpoint:
            try:
                loader.load_state_dict(self._of_rank().get("data", self._checkpoint["data"]))
                return
            except LoaderStateError as error:
                self._accept("data", f"{self.path}: {error}", error)
        ended = self.cut.point is CutPoint.FINISHED and self._own["settings"]["train_unit"] == "EPOCH"
        is_over = self.cut.point is CutPoint.EPOCH_END or ended
        loader.set_epoch(self.state.global_epoch - (not is_over))
        self.state.dataset_iter = 0

    def _of_rank(self) -> dict[str, Any]:
        """Return what this rank had of its own beside what rank 0 had, if the run goes on with as many ranks."""
        rank, is_as_before = self._ranks.rank, self._world_size == self._ranks.world_size
        return self._others[rank - 1] if is_as_before and 0 < rank <= len(self._others) else {}

    def restore_objects(self, model: Model, plugins: PluginRegistry) -> None:
        """Give model and plug-ins their states; after `setup`."""
        if is_in_parts(self.path):
            self._fetch_shards(model)
        own = self._of_rank()
        load_model(model, overlaid(self._checkpoint["model"], own.get("model", [])), self.path)
        # `check_plugins` let no other pass unless it may begin anew.
        there = {plug_id: self._checkpoint[plug_id] for plug_id in plugins if plug_id in self._checkpoint}
        of_plugins = overlaid(there, own.get("plugins", []))
        for plug_id in there:
            plugins[plug_id].load_state_dict(of_plugins[plug_id])

    def _fetch_shards(self, model: Model) -> None:
        """Read the tensors of which each rank has a part, onto the meshes that the networks are on now."""
        whole = with_parts(self.path, model)
        self._checkpoint = {key: whole[key] for key in self._checkpoint}
        if self._own:
            self._own = whole["training_state"]["trainer"]
            self._others = self._own.get("ranks", [])

    def restore_surroundings(self, model: Model, random_seed: int, is_over: bool = False) -> None:
        """Put back what the hooks at the start of training may have touched; last before the loop.

        Args:
            model: the user's model.
            random_seed: for ranks whose generators cannot go on as they were.
            is_over: training does not go on. If it does, from its end, `on_training_end` may have switched
                to evaluation.
        """
        try:
            self._restore_own(model, is_over)
        except KeyError as error:
            raise ValueError(
                f"{self.path} lacks {error} in training_state['trainer']: it is damaged"
            ) from error
        self._restore_generators(random_seed)
        # Or second copies of weights and gradients would stay in memory.
        self._checkpoint, self._own, self._others = {}, {}, []

    def say_what_differs(self, settings: TrainerSettings, loader: ResumableDataLoader) -> None:
        """Warn of what may differ, but makes the run end with other bits than it would have."""
        if not self._ranks.is_first:  # whose values these are: each rank may have another batch size
            return
        before = self._own.get("noted", {})  # which 0.1 did not write
        for name, now in noted(settings, loader).items():
            if name in before and before[name] != now:
                get_root_logger().warning(
                    "%s was written with %s=%s, and the run goes on with %s: it will not end with the bits that it "
                    "would have had",
                    self.path,
                    name,
                    before[name],
                    now,
                )

    def _restore_generators(self, random_seed: int) -> None:
        if "rng" not in self._checkpoint or self._is_reseeded:
            return  # accepted: they go on as they were seeded
        rng = dict(self._checkpoint["rng"])
        others = rng.pop("ranks", [])
        if self._world_size != self._ranks.world_size:
            self._seed_anew(random_seed)
            return
        if len(others) != self._world_size - 1:
            self._accept(
                "rng",
                f"{self.path} has the generators of {1 + len(others)} ranks, and was written by {self._world_size}",
            )
            return
        own = rng if self._ranks.is_first else others[self._ranks.rank - 1]
        try:
            load_rng_state_dict(own, ignore_cuda="rng.cuda" in self._accepted)
        except RNGStateError as error:
            name = "rng.cuda" if str(error).startswith("cuda") else "rng"
            self._accept(name, f"{self.path}: generators: {error}", error)

    def _seed_anew(self, random_seed: int) -> None:
        """Give each rank new streams of numbers, the same in every process that goes on from here."""
        place = (self._ranks.world_size, self._ranks.rank, self.state.global_iteration)
        seed_rngs(derive_seed(random_seed, "ranks", *place))
        get_root_logger().info(
            "%s was written with world size %d, and the run goes on with %d: every sample keeps its place in the order "
            "and its augmentation, none is lost or repeated; the generators of the ranks are seeded anew",
            self.path,
            self._world_size,
            self._ranks.world_size,
        )
        lost = {key for key in ("model", "plugins") for other in self._others if _has_any(other.get(key, []))}
        if lost:
            get_root_logger().warning(
                "the ranks that wrote %s had other states of %s than rank 0, which all go on with now: what they had "
                "of their own is lost",
                self.path,
                " and ".join(sorted(lost)),
            )

    def _restore_own(self, model: Model, is_over: bool) -> None:
        own = self._with(self._of_rank())
        modes, aliases = own["modes"], own.get("aliases", {})  # which 0.1 did not write
        if self._world_size != self._ranks.world_size:
            own = self._shared_out(own)
        restore_tables(model, own["tables"])
        restore_gradients(model, own["gradients"], aliases)
        restore_frozen(model, modes, aliases)
        restore_buffers(model, _what_is_there(overlaid({}, own.get("buffers", []))))
        restore_unsynchronised(model, own.get("unsynchronised", []))
        if is_over or self.cut.point is not CutPoint.FINISHED:
            restore_training_modes(model, modes, aliases)

    def _with(self, other: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a rank had: what rank 0 had, and what was other there."""
        gradients = overlaid(self._own["gradients"], other.get("gradients", []))
        return {**self._own, **other, "gradients": _what_is_there(gradients)}

    def _shared_out(self, own: dict[str, Any]) -> dict[str, Any]:
        """Return what each of another number of ranks gets, so that their mean is the mean that there was."""
        everyone = [self._own, *map(self._with, self._others)]
        running = average_of_ranks([each["tables"]["_running_losses"] for each in everyone])
        gradients = average_of_ranks([each["gradients"] for each in everyone])
        return {**own, "tables": {**own["tables"], "_running_losses": running}, "gradients": gradients}


def _has_any(changes: list[dict[str, Any]]) -> bool:
    """Whether something of a rank is among what it has otherwise than rank 0, and not only less."""
    found = [change.get("value", change.get("keys")) for change in changes]
    return not all(isinstance(value, dict | list) and not value for value in found)


def _what_is_there(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def is_in_parts(path: Path) -> bool:
    """Whether a checkpoint is one of those that keep tensors of which each rank has a part in files of their own."""
    name = parse_name(path.name)
    return name is not None and name.is_sharded


def with_parts(path: Path, model: Model) -> dict[str, Any]:
    """Return what a checkpoint holds, with the tensors in parts on the meshes that a model's networks are on."""
    types = model.types_for_safe_load()
    return load_sharded(path, meshes=meshes_of(model), map_location=model.map_loc, safe_types=types)


def load_model(model: Model, state: dict[str, Any], path: Path) -> None:
    """Give a model its state from a checkpoint.

    Raises:
        ValueError: the model could not take it, and has other parts than the checkpoint; they are named.
        Exception: what the model's `load_state_dict` raised, if it has the same parts.
    """
    try:
        with taking_other_shards(model):
            model.load_state_dict(state)
    except Exception as error:
        own, there = set(_names_in(model.state_dict())), set(_names_in(state))
        if own == there:
            get_root_logger().error("%s could not be loaded into %s", path, type(model).__name__)
            raise
        parts = [
            f"{what}: {_shortened(sorted(names))}"
            for what, names in (("missing there", own - there), ("unexpected", there - own))
            if names
        ]
        raise ValueError(
            f"{path} is of another model than {type(model).__name__} is now, whose load_state_dict raised "
            f"{type(error).__name__}: {error}. {'; '.join(parts)}. Give the run another run_name or chkpt_root, "
            "or let load_state_dict take the old state"
        ) from error


def _names_in(state: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield the names of a state's parts. What is under numbers is an optimizer's, and grows while it trains."""
    for key, value in state.items():
        if isinstance(key, str):
            if isinstance(value, Mapping) and any(isinstance(k, str) for k in value):
                yield from _names_in(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"


def _shortened(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
