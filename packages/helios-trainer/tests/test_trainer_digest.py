"""Digests of a ledger: the same for the same values everywhere, others for others."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from helios.core import rng
from helios.trainer._digest import digest

Pair = namedtuple("Pair", "x y")


@dataclass
class Sample:
    x: torch.Tensor
    note: str
    itself: object = None


@dataclass(frozen=True)
class Odd:
    read: object  # a generator: nothing that pickle takes


DISTINCT = [
    None, True, False, 0, 1, -1, 2**70, 0.0, -0.0, 1.0, float("nan"), float("inf"), 1j, "", "a", "1", "\ud800", b"",
    b"a", [], [1], (1,), [[1]], [1, 2], [2, 1], [1.0], ["1"], [None], [[], []], {}, {"a": 1}, {"a": 2}, {1: "a"}, set(),
    {1, 2}, {"a": 1, "b": 2}, {"b": 1, "a": 2}, list(range(20)), tuple(range(20)), [*range(19), True],
    [2**63, *range(9)],
    torch.tensor([1]), torch.tensor([[1]]), torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32),
    torch.zeros(0), torch.zeros(0, 3), torch.zeros(3, 0), torch.tensor(1), torch.tensor(0.0), torch.tensor(-0.0),
    torch.tensor([True]), torch.tensor([1], dtype=torch.uint8), torch.tensor([1.0], dtype=torch.bfloat16),
    torch.tensor([1 + 2j]), torch.tensor([1 + 2j]).conj(), torch.tensor([[0, 1]]).to_sparse(),
    torch.tensor([[1, 0]]).to_sparse(), torch.tensor([[1, 0]]),
    np.array([1]), np.array([1.0]), np.array([[1]]), np.float32(1), np.float64(1), np.array(["1"]), np.array([None, 1]),
    Sample(torch.ones(1), "a"), Sample(torch.ones(1), "b"), Sample(torch.zeros(1), "a"), Path("a"), Sample, len,
]  # fmt: skip


def test_values_that_differ_have_other_digests():
    values = DISTINCT
    digests = [digest(value) for value in values]
    assert len(set(digests)) == len(values)
    assert digests == [digest(value) for value in values]
    assert all(len(found) == 16 for found in digests)


def test_values_that_are_equal_have_equal_digests():
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert (
        digest(x) == digest(x.contiguous(memory_format=torch.channels_last)) == digest(torch.nn.Parameter(x))
    )
    assert digest(x.transpose(0, 1)) == digest(x.transpose(0, 1).clone())
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) == digest(OrderedDict(b=2, a=1))
    assert digest({"b", "a", "c"}) == digest({"c", "b", "a"})
    assert digest((1, 2)) == digest(Pair(1, 2))
    conjugate = torch.tensor([1 + 2j]).conj()
    assert digest(conjugate) == digest(conjugate.resolve_conj())


def test_digests_are_the_same_in_every_process_and_release(python):
    """Written down, since ledgers of different machines and days are compared."""
    value = '[{"x": torch.arange(6.).reshape(2, 3), "s": {"a", "b", "c"}, "n": None}, ("é", 1.5, True), np.arange(3)]'
    code = f"""
import numpy as np, torch
from helios.trainer._digest import digest
print(digest({value}))
"""
    assert python(code).strip() == digest(eval(value)) == "5a4d265ea5dd49e7"


def test_what_holds_itself_ends():
    loop = [1]
    loop.append(loop)
    other = [2]
    other.append(other)
    assert digest(loop) != digest(other)


def test_what_has_no_content_is_refused():
    with pytest.raises(TypeError, match=r"found builtins.generator: "):
        digest([Odd(x for x in [])])


def test_a_batch_is_left_as_it_is():
    before = rng.get_rng_state_dict()["torch"]
    batch = {"x": torch.ones(2, requires_grad=True), "y": [torch.zeros(2)]}
    digest(batch)
    assert batch["x"].requires_grad and torch.equal(batch["x"], torch.ones(2))
    assert torch.equal(rng.get_rng_state_dict()["torch"], before)
