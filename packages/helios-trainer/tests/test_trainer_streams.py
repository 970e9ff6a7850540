"""Training on iterable-style datasets, with and without a length."""

import random

import pytest
import torch

from helios.data import DataModule

pytestmark = pytest.mark.long


class Stream(torch.utils.data.IterableDataset):
    """Counts, with noise; knows where it stands."""

    def __init__(self, num_samples):
        self.num_samples, self.at = num_samples, 0

    def __iter__(self):
        while self.at < self.num_samples:
            self.at += 1
            x = torch.sin(torch.arange(4.0) * self.at) + 0.1 * torch.randn(4) + 0.01 * random.random()
            yield x, self.at
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class SizedStream(Stream):
    def __len__(self):
        return self.num_samples


class StreamData(DataModule):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def setup(self):
        self._train_dataset = self._create_dataset(self.kind(7), {"batch_size": 2})
        self._valid_dataset = self._create_dataset(self.kind(3), {"batch_size": 2})
        self._test_dataset = self._create_dataset(self.kind(5), {"batch_size": 2})


def run(kit, root, kind, unit, at=None, **options):
    by_epoch = unit == "EPOCH"
    model = kit.Net(abort_at=at)
    trainer = kit.trainer(
        getattr(kit, unit), 3 if by_epoch else 11, valid_frequency=1 if by_epoch else 3, print_frequency=1,
        chkpt_frequency=1 if by_epoch else 2, chkpt_root=root, **options,
    )  # fmt: skip
    data = StreamData(kind)
    try:
        trainer.fit(model, data)
    except kit.AbortError:
        return model
    trainer.test(model, data)
    model.end = kit.end_of(model)
    return model


@pytest.mark.parametrize("bar", [False, True])
@pytest.mark.parametrize("unit", ["EPOCH", "ITERATION"])
@pytest.mark.parametrize("kind", [Stream, SizedStream])
def test_a_whole_run_and_an_interrupted_one(kit, tmp_path, kind, unit, bar):
    whole = run(kit, tmp_path / "whole", kind, unit, enable_progress_bar=bar)
    assert [ids for ids, _ in whole.batches[:5]] == [[1, 2], [3, 4], [5, 6], [7], [1, 2]]
    logged = [call[1][3] for call in whole.trace if call[0] == "on_training_batch_end" and call[2]]
    assert logged == ([4, 4, 4] if unit == "EPOCH" else [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3])
    for at in (12, 25, 38):
        first = run(kit, tmp_path / str(at), kind, unit, at)
        assert first.trace == whole.trace[:at]
        rest = run(kit, tmp_path / str(at), kind, unit)
        assert rest.batches == whole.batches[len(whole.batches) - len(rest.batches) :]
        assert rest.end == whole.end
