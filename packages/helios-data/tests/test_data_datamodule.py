"""DataLoaderParams, DataModule and DatasetSplit."""

import inspect

import pytest

from helios.data import (
    DataLoaderParams,
    DataModule,
    DatasetSplit,
    ResumableRandomSampler,
    SplitDataset,
    create_dataloader,
)


def test_params_are_the_options_of_create_dataloader():
    """The same names with the same defaults, so that neither can be forgotten."""
    options = dict(inspect.signature(create_dataloader).parameters)
    del options["dataset"]
    assert DataLoaderParams().to_dict() == {name: option.default for name, option in options.items()}
    assert list(DataLoaderParams().to_dict()) == list(options)


def test_params_to_and_from_dict():
    sampler = ResumableRandomSampler(range(3))
    params = DataLoaderParams.from_dict({"batch_size": 7, "sampler": sampler})
    assert (params.batch_size, params.num_workers) == (7, 0)
    assert params.sampler is sampler
    assert DataLoaderParams.from_dict(params.to_dict()) == params
    assert params.to_dict()["sampler"] is sampler
    assert DataLoaderParams.from_dict({}) == DataLoaderParams()


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (None, TypeError, "values must be a dict, found NoneType"),
        ([("batch_size", 1)], TypeError, "values must be a dict, found list"),
        (
            {"batchsize": 1},
            ValueError,
            "values has the unknown field 'batchsize'; the fields are random_seed, ",
        ),
        ({3: 1}, ValueError, "values has the unknown field '3'"),
    ],
)
def test_params_from_what_is_no_dict_of_them(values, error, message):
    with pytest.raises(error, match=message):
        DataLoaderParams.from_dict(values)


class Numbers(DataModule):
    def __init__(self, train, valid):
        super().__init__()
        self.options = (train, valid)

    def setup(self):
        train, valid = self.options
        self._train_dataset = self._create_dataset(range(10), train)
        self._valid_dataset = self._create_dataset(range(100, 104), valid)


def order(loader):
    return [i for batch in loader for i in batch.tolist()]


def test_flow():
    train = {"batch_size": 3, "shuffle": True, "random_seed": 4}
    valid = DataLoaderParams(batch_size=2)
    module = Numbers(train, valid)
    module.prepare_data()
    assert (module.train_dataset, module.train_dataloader()) == (None, None)
    module.setup()
    # Copied: what becomes of the options later changes nothing.
    train["batch_size"] = 99
    valid.batch_size = 99
    loader = module.train_dataloader()
    assert loader.batch_size == 3
    assert order(loader) == order(create_dataloader(range(10), shuffle=True, random_seed=4))
    assert [batch.tolist() for batch in module.valid_dataloader()] == [[100, 101], [102, 103]]
    assert (module.train_dataset, module.valid_dataset) == (range(10), range(100, 104))
    assert (module.test_dataset, module.test_dataloader()) == (None, None)
    assert module.train_dataloader() is not loader
    assert module.trainer is None
    module.teardown()


def test_the_trainer_makes_it_distributed():
    module = Numbers({}, {})
    module.setup()
    assert module.is_distributed is False
    module.is_distributed = True
    with pytest.raises(RuntimeError, match="there is no process group"):
        module.train_dataloader()
    assert Numbers.is_distributed is DataModule.is_distributed is False


def test_evaluation_options_hold_with_and_without_ranks():
    """tail="exact" stands in the same module on one process and on many."""
    module = Numbers({}, {"tail": "exact", "batch_size": 3})
    module.setup()
    assert order(module.valid_dataloader()) == [100, 101, 102, 103]


def test_a_module_that_does_not_call_our_init():
    class Forgetful(DataModule):
        def __init__(self):
            self.size = 3

        def setup(self):
            self._test_dataset = self._create_dataset(range(self.size), {})

    module = Forgetful()
    assert module.train_dataloader() is None
    module.setup()
    assert order(module.test_dataloader()) == [0, 1, 2]
    assert Forgetful().test_dataset is None


def test_wrong_splits_are_named():
    module = DataModule()
    for bad in (None, 3, [("batch_size", 1)]):
        with pytest.raises(
            TypeError, match=f"params must be DataLoaderParams or a dict .* found {type(bad).__name__}"
        ):
            module._create_dataset(range(3), bad)
    with pytest.raises(ValueError, match="values has the unknown field 'batch'"):
        module._create_dataset(range(3), {"batch": 1})
    module._train_dataset = range(3)
    for use in (module.train_dataloader, lambda: module.train_dataset):
        with pytest.raises(
            TypeError, match=r"assigned as self\._create_dataset\(dataset, params\), found range"
        ):
            use()
    assert isinstance(module._create_dataset(range(3), {}), SplitDataset)


@pytest.mark.parametrize("split", DatasetSplit)
def test_split_from_str(split):
    for label in (split.name, split.name.lower(), split.name.title()):
        assert DatasetSplit.from_str(label) is split


@pytest.mark.parametrize(
    ("label", "error", "message"),
    [
        ("training", ValueError, "label must be one of 'train', 'valid', 'test', found 'training'"),
        ("", ValueError, "label must be one of 'train', 'valid', 'test', found ''"),
        (0, TypeError, "label must be a str, found int 0"),
        (None, TypeError, "label must be a str, found NoneType None"),
    ],
)
def test_split_from_another_str(label, error, message):
    with pytest.raises(error, match=message):
        DatasetSplit.from_str(label)
