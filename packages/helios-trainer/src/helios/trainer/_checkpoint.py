"""What a checkpoint of a run holds."""

from collections.abc import Mapping
from typing import Any

from helios.core.rng import get_rng_state_dict
from helios.data import ResumableDataLoader
from helios.trainer._loop import Cut, StopReason, as_dict
from helios.trainer._model import Model, tables_of
from helios.trainer._modules import aliases_of, gradients_of, modes_of
from helios.trainer._plugin import Plugin, PluginRegistry, is_overridden
from helios.trainer._rank_state import states_of_ranks
from helios.trainer._ranks import Ranks
from helios.trainer._replicas import reshard, unsynchronised
from helios.trainer._settings import TrainerSettings
from helios.trainer._training_state import TrainingState
from helios.trainer.logging._places import LogTargets


def build_checkpoint(
    cut: Cut,
    stop: StopReason | None,
    *,
    settings: TrainerSettings,
    state: TrainingState,
    model: Model,
    plugins: PluginRegistry,
    train_loader: ResumableDataLoader,
    targets: LogTargets,
    event_sizes: Mapping[str, int],
    ranks: Ranks,
) -> dict[str, Any]:
    """Return everything that a resumed run needs, at a cut of the loop.

    All ranks call it. What rank 0 gets is whole; of what the others get, only their shards of tensors count.
    """
    reshard(model)
    # First, since a state_dict below may draw a number, which must not matter: see CheckpointSaver.
    generators = get_rng_state_dict()
    of_plugins = {
        plug_id: checked_state(f"plug-in {plug_id!r}", plugin.state_dict())
        for plug_id, plugin in plugins.items()
    }
    own = {
        "tables": tables_of(model),
        "gradients": gradients_of(model),
        "modes": modes_of(model),
        "aliases": aliases_of(model),
        "unsynchronised": unsynchronised(model),
    }
    of_model = checked_state("model", model.state_dict())
    data = dict(train_loader.state_dict())
    others = states_of_ranks(
        ranks, model, generators, {**own, "model": of_model, "data": data, "plugins": of_plugins}
    )
    own |= {
        "cut": as_dict(cut),
        "stop": None if stop is None else stop.name,
        "settings": settings.decisive(),
        "noted": noted(settings, train_loader),
        "event_sizes": dict(event_sizes),
        "world_size": ranks.world_size,
        "ranks": [{key: value for key, value in each.items() if key != "rng"} for each in others],
    }
    rng = dict(generators)
    if ranks.world_size > 1:
        rng["ranks"] = [each["rng"] for each in others]  # after this one
    return {
        "training_state": {**state.to_dict(), "trainer": own},
        "model": of_model,
        "data": data,
        **targets.to_dict(),
        **of_plugins,
        "rng": rng,
    }


def noted(settings: TrainerSettings, train_loader: ResumableDataLoader) -> dict[str, Any]:
    """Return what may differ when a run goes on, but makes other bits of it."""
    return {**settings.noted(), "batch_size": train_loader.batch_size}


def checked_state(owner: str, state: Any) -> dict[str, Any]:
    """Return what a state_dict() returned, if it is a dict."""
    if not isinstance(state, dict):
        raise TypeError(f"state_dict of the {owner} must return a dict, found {type(state).__name__}")
    return state


def metadata_of(model: Model, name: str) -> str:
    """Return what the model appends to a checkpoint's name."""
    answer = model.append_metadata_to_chkpt_name(name)
    if not isinstance(answer, str):
        raise TypeError(
            f"append_metadata_to_chkpt_name must return a str, found {type(answer).__name__} {answer!r}"
        )
    return answer.removeprefix(name).removeprefix("_").removesuffix(".pth")


def check_pairs(model: Model, plugins: PluginRegistry) -> None:
    """Check that what saves its state takes it back.

    Raises:
        TypeError: `state_dict` is overridden, and `load_state_dict` is not.
    """
    owners: list[tuple[str, Model | Plugin, type]] = [("model", model, Model)]
    owners += [(f"plug-in {plug_id!r}", plugin, Plugin) for plug_id, plugin in plugins.items()]
    for owner, part, base in owners:
        if is_overridden(part, "state_dict", base) and not is_overridden(part, "load_state_dict", base):
            raise TypeError(
                f"the {owner} ({type(part).__name__}) overrides state_dict, but not load_state_dict: nothing of its "
                "state would come back after a restart"
            )
