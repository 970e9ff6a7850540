"""The loader with Accelerate: what save_state saved, load_state continues exactly, in mid-epoch too.

Compared are all batches, with their augmentation, and the weights. A kill is an exception right after
save_state where that is the same and cheaper, and a real SIGKILL in the last test. Every guarantee has a
control: the loaders of torch and torchdata in the same place.
"""

import random
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from accelerate.utils import DataLoaderConfiguration
from script_runner import run_whole_and_killed
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from helios.core.rng import get_default_numpy_rng, seed_rngs
from helios.data import create_dataloader

EXAMPLE = Path(__file__).parent.parent / "examples" / "accelerate_resume.py"
BATCHES = 6  # in an epoch
EPOCHS = 3

# torchdata looks at all of torch's names.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


class Noisy(torch.utils.data.Dataset):
    """Draws from all three generators for each sample."""

    def __len__(self):
        return 22

    def __getitem__(self, index):
        noise = torch.rand(3) + random.random() + get_default_numpy_rng().generator.random()
        return index, (noise * (index + 1) / 22).float()


def ours(workers, **options):
    options = {"shuffle": True, "random_seed": 5, **options}
    return create_dataloader(Noisy(), batch_size=4, num_workers=workers, **options)


def torchs(workers):
    return torch.utils.data.DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers)


def torchdatas(workers):
    return StatefulDataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers)


def epochs_of(loader, step):
    """The epochs that are left: as the loader says, or else as many as steps are left."""
    if hasattr(loader, "epoch"):
        while loader.epoch < EPOCHS:
            yield loader.epoch
    else:
        yield from range(step // BATCHES, EPOCHS)


class KilledError(Exception):
    """What ends a run right after it was saved."""


def train(make, workers, folder=None, step=0, kill=None, prepares=True, accumulation=1, **config):
    """Train to the end, or until the state after `kill` steps, or after that epoch, is saved in a folder."""
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulation,
        dataloader_config=DataLoaderConfiguration(**config),
    )
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    loader, seen = make(workers), []
    if prepares:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(loader)
    num_skipped = 0
    if step:
        accelerator.load_state(folder)
        if not getattr(loader, "use_stateful_dataloader", True):
            num_skipped = step % BATCHES  # what Accelerate's documentation does for torch's loader

    def save(where):
        if kill == (step, where):
            accelerator.save_state(folder)
            raise KilledError

    try:
        for epoch in epochs_of(loader, step):
            batches = skip_first_batches(loader, num_skipped) if num_skipped else loader
            num_skipped = 0
            for index, values in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(model(values).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
                seen.append((epoch, index.tolist(), values.numpy().tobytes()))
                step += 1
                save("batch")
            save("epoch")
        assert kill is None
    except KilledError:
        pass
    return seen, [weight.tolist() for weight in model.parameters()]


def run(root, make, kills, workers=(0,) * 9, **options):
    """Train, killed and resumed as told; return all that was seen, and the weights."""
    seen, step = [], 0
    for life, kill in enumerate([*kills, None]):
        seed_rngs(life)  # a new process would not have the generators of the old one either
        more, weights = train(make, workers[life], root, step, kill, **options)
        seen += more
        step = len(seen)
    return seen, weights


WORKERS = [(0, 0, 0), (2, 2, 2), (2, 0, 1)]
KILLS = {
    "in the first epoch": [(2, "batch")],
    "in mid-epoch": [(8, "batch")],
    "at the last batch": [(12, "batch")],
    "at the end of an epoch": [(12, "epoch")],
    "twice in an epoch": [(8, "batch"), (10, "batch")],
    "at a last batch, then in mid-epoch": [(6, "batch"), (9, "batch")],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not killed."""
    return run(tmp_path_factory.mktemp("whole"), ours, [])


@pytest.mark.parametrize("workers", WORKERS, ids=str)
@pytest.mark.parametrize("kills", KILLS.values(), ids=KILLS.keys())
def test_a_killed_run_is_resumed_exactly(whole, tmp_path, kills, workers):
    assert run(tmp_path, ours, kills, workers) == whole


def test_so_it_is_without_prepare(whole, tmp_path):
    """`register_for_checkpointing(loader)` is Accelerate's documented way for objects with a state."""
    kills = KILLS["at a last batch, then in mid-epoch"]
    assert run(tmp_path, ours, kills, (2, 0, 2), prepares=False) == whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("make", "is_stateful"), [(torchs, False), (torchdatas, True)], ids=["torch", "torchdata"]
)
def test_control_other_loaders_diverge(tmp_path, make, is_stateful, workers):
    options = {"workers": (workers, workers), "use_stateful_dataloader": is_stateful}
    seen, weights = run(tmp_path, make, [], **options)
    assert run(tmp_path, make, [], **options) == (seen, weights)
    killed_seen, killed_weights = run(tmp_path, make, [(8, "batch")], **options)
    assert killed_seen[:8] == seen[:8]
    assert killed_seen[8:] != seen[8:]
    assert killed_weights != weights


@pytest.mark.parametrize("is_stateful", [False, True])
def test_the_configuration_does_not_matter(whole, tmp_path, is_stateful):
    assert run(tmp_path, ours, [(8, "batch")], use_stateful_dataloader=is_stateful) == whole


def test_persistent_workers(whole, tmp_path):
    def make(workers):
        return ours(workers, persistent_workers=True)

    assert run(tmp_path, make, KILLS["at a last batch, then in mid-epoch"], (2, 2, 2)) == whole


class Stream(torch.utils.data.IterableDataset):
    """Goes on where it stands."""

    def __init__(self):
        self.next = 0

    def __iter__(self):
        while self.next < 22:
            self.next += 1
            yield self.next, torch.rand(3)

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def test_a_stream(tmp_path):
    def make(workers):
        return create_dataloader(Stream(), batch_size=4, num_workers=workers)

    kills = KILLS["twice in an epoch"]
    assert run(tmp_path, make, kills, (1, 0, 1)) == run(tmp_path, make, [])


def test_accumulated_gradients(tmp_path):
    """Saved where the optimizer made a step: Accelerate does not save gradients."""
    options = {"accumulation": 4}
    assert run(tmp_path, ours, [(8, "batch")], **options) == run(tmp_path, ours, [], **options)


def test_prepare_leaves_the_loader_alone(tmp_path):
    accelerator, loaders = Accelerator(cpu=True), [ours(0), ours(0, shuffle=False)]
    assert accelerator.prepare(*loaders) == tuple(loaders)
    assert accelerator.prepare(loaders[0]) is loaders[0]
    batches = iter(loaders[0])
    next(batches)
    accelerator.save_state(tmp_path)
    states = [loader.state_dict() for loader in loaders]
    assert [state["consumed"] for state in states] == [4, 0]
    assert [torch.load(tmp_path / f"dl_state_dict{i}.bin") for i in ("", "_1")] == states
    next(batches)
    list(loaders[1])
    accelerator.load_state(tmp_path)
    assert [loader.state_dict() for loader in loaders] == states


def test_each_rank_must_have_its_share(monkeypatch):
    accelerator, loader = Accelerator(cpu=True), ours(0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with pytest.raises(RuntimeError, match=r"each of the 2 ranks would take all .*is_distributed=True"):
        accelerator.prepare_data_loader(loader)
    shared = ours(0, is_distributed=True)
    assert accelerator.prepare_data_loader(shared) is shared


@pytest.mark.parametrize(
    "take_apart", [prepare_data_loader, lambda loader: skip_first_batches(loader, 1)], ids=["prepare", "skip"]
)
def test_a_loader_that_is_taken_apart_refuses(take_apart):
    """Functions of Accelerate that make another DataLoader of its parts, which would not be exact."""
    Accelerator(cpu=True)
    parts = take_apart(ours(0))
    assert type(parts) in (DataLoaderShard, torch.utils.data.DataLoader)
    with pytest.raises(RuntimeError, match="Iterate the loader itself"):
        next(iter(parts))
    next(iter(take_apart(torchs(0))))  # the control


def test_the_example_survives_sigkill(tmp_path):
    # The control is the same script with torch's loader, which has no epoch.
    control, source = tmp_path / "control.py", EXAMPLE.read_text()
    for ours, torchs in (
        ("= create_dataloader(", "= torch.utils.data.DataLoader("),
        ("while loader.epoch < 3:", "for _ in range(step // 13, 3):"),
    ):
        assert ours in source
        source = source.replace(ours, torchs)
    control.write_text(source)
    said = run_whole_and_killed(tmp_path, "accelerate", EXAMPLE, control)
    whole, *statuses, resumed, _ = said[:6]
    assert statuses == ["0", "-9", "-9"]
    assert resumed == whole
    whole, *statuses, resumed, _ = said[6:]
    assert statuses == ["0", "-9", "-9"]
    assert resumed != whole
