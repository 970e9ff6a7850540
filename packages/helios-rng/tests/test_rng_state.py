"""Seeding, saving and restoring: exact, all or nothing."""

import copy
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from helios.core import rng


def draws():
    """Something of every generator, of kinds that set values aside (gauss, 32-bit halves)."""
    generator = rng.get_default_numpy_rng().generator
    return (
        torch.rand(3).tolist(),
        torch.randn(1).tolist(),
        [random.random(), random.gauss(0, 1)],
        [generator.uniform(), int(generator.integers(0, 10, dtype=np.uint32)), generator.normal()],
    )


@pytest.fixture(autouse=True)
def seeded():
    rng.seed_rngs(1)


def test_default_seed():
    assert rng.DEFAULT_SEED == rng.get_default_seed() == 6691
    rng.seed_rngs()
    by_default = draws()
    rng.seed_rngs(6691)
    assert draws() == by_default
    rng.seed_rngs(6692)
    assert draws() != by_default


def test_seeding_is_what_the_libraries_call_seeding():
    rng.seed_rngs(5)
    ours = draws()
    torch.manual_seed(5)
    random.seed(5)
    rng.create_default_numpy_rng(5)
    assert draws() == ours
    assert rng.DefaultNumpyRNG(5).generator.random() == np.random.default_rng(5).random()


def test_the_generator_stays_the_same_object():
    generator = rng.get_default_numpy_rng().generator
    state = rng.get_rng_state_dict()
    rng.seed_rngs(9)
    rng.load_rng_state_dict(state)
    assert rng.get_default_numpy_rng().generator is generator
    assert rng.create_default_numpy_rng().generator is not generator


def test_skip_torch_leaves_torch_alone():
    before = torch.get_rng_state()
    rng.seed_rngs(77, skip_torch=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.random() == random.Random(77).random()


def test_legacy_numpy_is_never_touched():
    before = np.random.get_state()  # noqa: NPY002
    state = rng.get_rng_state_dict()
    rng.seed_rngs(3)
    rng.rekey_host_rngs(bytes(32))
    rng.load_rng_state_dict(state)
    after = np.random.get_state()  # noqa: NPY002
    assert before[0] == after[0] and np.array_equal(before[1], after[1]) and before[2:] == after[2:]


def test_round_trip_through_weights_only(tmp_path):
    random.gauss(0, 1)  # leaves one value set aside
    rng.get_default_numpy_rng().generator.integers(0, 10, dtype=np.uint32)  # leaves 32 bits set aside
    torch.save(rng.get_rng_state_dict(), tmp_path / "rng.pth")
    expected = draws()
    rng.seed_rngs(99)
    assert draws() != expected
    rng.load_rng_state_dict(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert draws() == expected


def broken_states():
    rng.seed_rngs(2)
    good = rng.get_rng_state_dict()

    def change(part, value):
        state = copy.deepcopy(dict(good))
        state[part] = value(state[part]) if callable(value) else value
        return part, state

    for part in ("torch", "python", "numpy"):
        yield part, {k: v for k, v in good.items() if k != part}
        yield change(part, None)
        yield change(part, "a string")
    yield change("torch", lambda t: t[:-1])
    yield change("torch", lambda t: t.to(torch.int32))
    yield change("torch", lambda t: torch.zeros_like(t))
    yield change("python", list)
    yield change("python", lambda s: (2, *s[1:]))
    yield change("python", lambda s: (3, s[1][:-1], s[2]))
    yield change("python", lambda s: (3, (*s[1][:-1], 99999), s[2]))
    yield change("python", lambda s: (3, (-1, *s[1][1:]), s[2]))
    yield change("python", lambda s: (3, s[1], "0.5"))
    yield change("numpy", lambda s: {**s, "bit_generator": "MT19937"})
    yield change("numpy", lambda s: {**s, "state": {"state": 1}})
    yield change("numpy", lambda s: {**s, "state": {"state": 2**128, "inc": 1}})
    yield change("numpy", lambda s: {**s, "state": {"state": 1, "inc": 2}})
    yield change("numpy", lambda s: {**s, "has_uint32": -1})
    yield change("numpy", lambda s: {**s, "uinteger": 1.5})
    yield change("numpy", lambda s: {**s, "surprise": 1})
    yield "cuda", {**good, "cuda": [torch.zeros(16, dtype=torch.uint8)]}
    yield "cuda", {**good, "cuda": 3}
    yield "mps", {**good, "mps": good["torch"]}
    yield "state", [good]


@pytest.mark.parametrize(("part", "state"), list(broken_states()))
def test_restore_is_all_or_nothing_and_names_the_part(part, state):
    rng.seed_rngs(4)
    expected = draws()
    rng.seed_rngs(4)
    with pytest.raises(rng.RNGStateError, match=rf"^{part}: "):
        rng.load_rng_state_dict(state)
    assert draws() == expected


def test_the_good_state_of_that_test_does_load():
    rng.seed_rngs(2)
    good = rng.get_rng_state_dict()
    expected = draws()
    rng.load_rng_state_dict(good)
    assert draws() == expected


def test_cuda_state_without_cuda_can_be_ignored_by_name():
    state = {**rng.get_rng_state_dict(), "cuda": [torch.zeros(16, dtype=torch.uint8)]}
    expected = draws()
    rng.load_rng_state_dict(state, ignore_cuda=True)
    assert draws() == expected


class FakeCUDA:
    """Two devices that record what is asked of them."""

    def __init__(self, monkeypatch):
        self.states = [torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)]
        self.seeds = []
        self.broken = False
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "manual_seed_all", self.seeds.append)
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [s.clone() for s in self.states])
        monkeypatch.setattr(torch.cuda, "set_rng_state_all", self.set_all)

    def set_all(self, states):
        if self.broken:
            self.broken = False
            raise RuntimeError("RNG state is wrong size")
        self.states = states


def test_cuda_calls(monkeypatch):
    fake = FakeCUDA(monkeypatch)
    rng.seed_rngs(12)
    assert fake.seeds[-1] == 12
    state = rng.get_rng_state_dict()
    assert [s.item() for s in state["cuda"]] == [1, 2]
    with rng.preserve_rng_state():
        fake.states = [torch.tensor([8], dtype=torch.uint8)] * 2
    assert [s.item() for s in fake.states] == [1, 2]
    fake.states = [torch.tensor([9], dtype=torch.uint8)] * 2
    rng.load_rng_state_dict(state)
    assert [s.item() for s in fake.states] == [1, 2]
    before = random.getstate()
    for bad in ([state["cuda"][0]], None):
        with pytest.raises(rng.RNGStateError, match=r"^cuda: .*ignore_cuda=True"):
            rng.load_rng_state_dict({**state, "cuda": bad})
    random.random()
    changed = random.getstate()
    fake.broken = True
    with pytest.raises(rng.RNGStateError, match=r"^cuda: RNG state is wrong size"):
        rng.load_rng_state_dict(state)
    assert random.getstate() == changed != before
    assert [s.item() for s in fake.states] == [1, 2]


@pytest.mark.parametrize("scope", [rng.preserve_rng_state, rng.preserve_host_rng_state])
def test_preserve_leaves_every_generator_unchanged(scope):
    expected = draws()
    rng.seed_rngs(1)
    with scope():
        draws()
        rng.create_default_numpy_rng(5)
        rng.rekey_host_rngs(bytes(range(32)))
    assert draws() == expected
    rng.seed_rngs(1)
    with pytest.raises(KeyError), scope():
        draws()
        raise KeyError
    assert draws() == expected


def test_rekey_is_a_function_of_the_key():
    rng.rekey_host_rngs(bytes(range(32)))
    first = draws()
    random.gauss(0, 1)
    rng.rekey_host_rngs(bytes(range(32)))
    assert draws() == first
    for byte in (0, 8, 31):  # the parts of the key for torch, random and NumPy
        key = bytearray(range(32))
        key[byte] ^= 1
        rng.rekey_host_rngs(bytes(key))
        assert draws() != first
    with pytest.raises(ValueError, match="key must have 32 bytes, found 31"):
        rng.rekey_host_rngs(bytes(31))


@pytest.mark.parametrize("bad", ["1", 1.0, True, b"1"])
def test_seed_of_the_wrong_type(bad):
    for function in (rng.seed_rngs, rng.create_default_numpy_rng, rng.DefaultNumpyRNG):
        with pytest.raises(TypeError, match=r"seed must be an int or None, found"):
            function(bad)


@pytest.mark.parametrize("bad", [-1, 2**64])
def test_seed_out_of_range(bad):
    expected = draws()
    rng.seed_rngs(1)
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*64\), found"):
        rng.seed_rngs(bad)
    assert draws() == expected


FRESH = """
import random, sys
before = random.getstate()
import torch
torch_before = torch.get_rng_state()
from helios.core import rng
assert random.getstate() == before and torch.equal(torch.get_rng_state(), torch_before)
for function in (rng.get_default_numpy_rng, rng.get_rng_state_dict):
    try:
        function()
    except RuntimeError as error:
        assert "seed_rngs()" in str(error)
    else:
        sys.exit("no error")
with rng.preserve_rng_state():
    rng.seed_rngs(3)
assert not rng.has_default_numpy_rng()
with rng.preserve_host_rng_state():
    rng.rekey_host_rngs(bytes(32))
assert not rng.has_default_numpy_rng()
numpy = rng.DefaultNumpyRNG(8).state_dict()
state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy}
rng.load_rng_state_dict(state)
assert rng.get_default_numpy_rng().generator.random() == rng.DefaultNumpyRNG(8).generator.random()
"""


def test_a_fresh_process_has_no_default_generator_and_import_draws_nothing():
    subprocess.run([sys.executable, "-c", FRESH], check=True)
