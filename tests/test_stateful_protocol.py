"""The protocol of torchdata's StatefulDataLoader: where that loader stands, ours can stand."""

import copy
from itertools import islice

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.stateful import Stateful as TorchStateful
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.stateful import Stateful

from helios.core.rng import seed_rngs
from helios.data import create_dataloader

BATCHES = 6  # in an epoch

# torchdata looks at all of torch's names.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


class Plain(torch.utils.data.Dataset):
    def __len__(self):
        return 22

    def __getitem__(self, index):
        return index


class Noisy(Plain):
    def __getitem__(self, index):
        return torch.rand(2) + index


def ours(dataset, workers, **options):
    return create_dataloader(dataset, batch_size=4, num_workers=workers, **options)


def torchdatas(dataset, workers, **options):
    return StatefulDataLoader(dataset, batch_size=4, num_workers=workers, **options)


# --- a user's code, written for torchdata's loader as its documentation shows -------------------------------


def train(loader, num_epochs, stop=None):
    """Return the batches of some epochs; with `stop`, those until then, and the state taken there."""
    seen = []
    for _ in range(num_epochs):
        for batch in loader:
            seen.append(batch.tolist())
            if len(seen) == stop:
                return seen, loader.state_dict()
    return seen


def go_on(loader, state, num_epochs):
    """Return what is left of the run: the rest of the epoch that the state is of, then whole ones."""
    loader.load_state_dict(state)
    return train(loader, num_epochs)


@pytest.mark.parametrize("protocol", [Stateful, TorchStateful], ids=["torchdata", "torch"])
def test_it_is_stateful(protocol):
    assert isinstance(ours(Plain(), 0), protocol)
    assert not isinstance(torch.utils.data.DataLoader(Plain()), protocol)  # the control


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [ours, torchdatas])
@pytest.mark.parametrize("stop", [1, 4, 5, 8])
def test_the_same_code_goes_on_with_either(make, workers, stop):
    whole = train(make(Plain(), workers), 2)
    begun, state = train(make(Plain(), workers), 2, stop)
    assert begun + go_on(make(Plain(), workers), state, 2 - stop // BATCHES) == whole
    assert whole == train(torch.utils.data.DataLoader(Plain(), batch_size=4), 2)


@pytest.mark.parametrize("stop", [1, 4, 6, 8])
@pytest.mark.parametrize("workers", [(0, 0), (2, 2), (2, 0), (0, 2)], ids=str)
def test_ours_is_exact_where_randomness_is(workers, stop):
    """Shuffled, with augmentation, with another number of workers, and at an epoch's last batch."""
    before, after = workers
    whole = train(ours(Noisy(), before, shuffle=True), 3)
    begun, state = train(ours(Noisy(), before, shuffle=True), 3, stop)
    left = 3 - stop // BATCHES
    assert begun + go_on(ours(Noisy(), after, shuffle=True), state, left) == whole
    # Neither what was drawn before nor the workers that fetch ahead have a part in it.
    assert (state["epoch"], state["consumed"]) == (stop // BATCHES, 4 * (stop % BATCHES))


@pytest.mark.parametrize("workers", [0, 2])
def test_control_torchdatas_is_not(workers):
    seed_rngs(0)
    whole = train(torchdatas(Noisy(), workers, shuffle=True), 3)
    seed_rngs(0)
    begun, state = train(torchdatas(Noisy(), workers, shuffle=True), 3, 8)
    assert begun == whole[:8]
    seed_rngs(1)  # as in another process
    assert begun + go_on(torchdatas(Noisy(), workers, shuffle=True), state, 2) != whole
    with pytest.raises(AssertionError):
        go_on(torchdatas(Noisy(), 2 - workers, shuffle=True), state, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_is_taken_and_loaded_at_any_time(workers):
    loader = ours(Noisy(), workers, shuffle=True)
    whole = train(ours(Noisy(), 0, shuffle=True), 2)
    states = [loader.state_dict()]
    for batch in loader:
        assert batch.tolist() == whole[len(states) - 1]
        states.append(loader.state_dict())
        assert loader.state_dict() == states[-1]  # taking it changes nothing
    kept = copy.deepcopy(states)
    for taken, state in enumerate(states):  # into the loader that gave it, and always another one
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        expected = whole[:BATCHES][taken : taken + 2] or whole[BATCHES : BATCHES + 2]
        assert [batch.tolist() for batch in islice(loader, 2)] == expected
    assert states == kept


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iteration_does_not_survive_a_load(workers):
    """torchdata's goes on where it was, and what is loaded counts for the next one; ours refuses."""
    loader = ours(Plain(), workers)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    next(batches)
    loader.load_state_dict(state)
    with pytest.raises(RuntimeError, match="its epoch or state was set"):
        next(batches)
    assert train(loader, 1) == train(ours(Plain(), 0), 1)[1:]


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}], ids=["", "persistent"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_epoch_may_be_chosen_until_the_first_batch(workers, options):
    """Lightning calls iter(), then set_epoch(), then next(); workers have begun to fetch by then."""
    loader = ours(Noisy(), workers, shuffle=True, **options)
    whole = train(ours(Noisy(), 0, shuffle=True), 3)
    batches = iter(loader)
    loader.set_epoch(2)
    assert next(batches).tolist() == whole[2 * BATCHES]
    assert (loader.epoch, loader.state_dict()["consumed"]) == (2, 4)
    assert [batch.tolist() for batch in batches] == whole[2 * BATCHES + 1 :]
    loader.set_epoch(0)
    batches = iter(loader)
    loader.sampler.set_epoch(1)
    assert [batch.tolist() for batch in batches] == whole[BATCHES : 2 * BATCHES]
    batches = iter(loader)
    assert next(batches).tolist() == whole[2 * BATCHES]
    loader.set_epoch(1)
    with pytest.raises(RuntimeError, match="its epoch or state was set"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loaded_state_is_not_lost_to_set_epoch(workers):
    """A loop that begins at epoch 0 again would train on the same epochs twice, unnoticed."""
    whole = train(ours(Noisy(), 0, shuffle=True), 3)
    loader = ours(Noisy(), workers, shuffle=True)
    _, state = train(ours(Noisy(), 0, shuffle=True), 3, 8)
    loader.load_state_dict(state)
    loader.set_epoch(0)
    with pytest.raises(RuntimeError, match=r"a state of epoch 1 was loaded, and set_epoch\(0\) went back"):
        next(iter(loader))
    loader.load_state_dict(state)
    loader.set_epoch(1)
    assert train(loader, 1) == whole[8:12]
    loader.load_state_dict(state)
    loader.set_epoch(2)  # the rest of an epoch may be skipped
    assert train(loader, 1) == whole[12:]
    loader.set_epoch(0)  # and what was used can be gone back from
    assert train(loader, 1) == whole[:6]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_torchs_distributed_checkpoint(tmp_path):
    """It takes whatever follows the protocol, as torchtitan does."""
    loader, other = ours(Noisy(), 0, shuffle=True), ours(Noisy(), 2, shuffle=True)
    whole = train(ours(Noisy(), 0, shuffle=True), 2)
    train(loader, 2, 8)
    checkpoint.save({"loader": loader}, checkpoint_id=tmp_path, no_dist=True)
    checkpoint.load({"loader": other}, checkpoint_id=tmp_path, no_dist=True)
    assert other.state_dict() == loader.state_dict()
    assert train(other, 1) == whole[8:]
