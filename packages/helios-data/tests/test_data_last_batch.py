"""What the loader says of the batch that the loop received last: which samples, and whether the epoch is over."""

import pytest
import torch
from torch.utils.data import IterableDataset

from helios.data import ResumableDistributedSampler, create_dataloader

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a machine with one core
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # Python 3.12 and later
]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_indices_and_end_of_every_batch(num_workers, drop_last):
    options = {"batch_size": 4, "shuffle": True, "drop_last": drop_last, "num_workers": num_workers}
    loader = create_dataloader(torch.arange(22), **options)
    assert loader.last_indices is None
    for _ in range(2):
        ends = []
        for batch in loader:
            assert batch.tolist() == loader.last_indices
            ends.append(loader.is_epoch_over)
        assert ends == [False] * (len(loader) - 1) + [True]
        assert not loader.is_epoch_over  # the next one has begun


@pytest.mark.parametrize("consumed", [1, 5])
def test_after_a_resume(consumed):
    loader = create_dataloader(torch.arange(22), batch_size=4, shuffle=True)
    batches = [batch.tolist() for batch in loader]
    loader.set_epoch(0)
    iterator = iter(loader)
    for _ in range(consumed):
        next(iterator)
    other = create_dataloader(torch.arange(22), batch_size=4, shuffle=True)
    other.load_state_dict(loader.state_dict())
    assert next(iter(other)).tolist() == other.last_indices == batches[consumed]
    assert other.is_epoch_over == (consumed == 5)


@pytest.mark.parametrize("drop_last", [False, True])
def test_of_one_rank_among_several(drop_last):
    for rank in range(3):
        sampler = ResumableDistributedSampler(torch.arange(17), 3, rank, drop_last=drop_last, batch_size=2)
        loader = create_dataloader(torch.arange(17), sampler=sampler, batch_size=2)
        seen = [(batch.tolist() == loader.last_indices, loader.is_epoch_over) for batch in loader]
        assert seen == [(True, False)] * (len(loader) - 1) + [(True, True)]


class Count(IterableDataset):
    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 7:
            self.at += 1
            yield self.at
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streams_have_no_indices(num_workers):
    loader = create_dataloader(Count(), batch_size=2, num_workers=num_workers)
    ends = []
    for _ in loader:
        assert loader.last_indices is None
        ends.append(loader.is_epoch_over)
    assert ends == [False] * (len(ends) - 1) + [True]
