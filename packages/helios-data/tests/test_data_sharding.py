"""Dealing out an epoch: every position to one rank once, also when ranks and batch sizes change under way."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from helios.data import ResumableDistributedSampler, ResumableRandomSampler, Tail, create_dataloader
from helios.data._sharding import Sharding

exact = settings(deadline=None, derandomize=True)  # no clock, the same examples every time
sizes = st.integers(1, 200)
batch_sizes = st.integers(1, 20)
worlds = st.integers(1, 9)
unequal = st.lists(batch_sizes, min_size=1, max_size=6)


def ranks(num_samples, batch_size, world, tail, drop_partial=False, is_interleaved=False):
    return [
        Sharding(num_samples, batch_size, rank, world, tail, drop_partial, is_interleaved)
        for rank in range(world)
    ]


def varying(world):
    """Batch sizes of so many ranks, 1 to 9, that jump about from step to step and epoch to epoch."""
    return lambda epoch, cursor: [
        1 + (7 * epoch + 5 * cursor + cursor // 11 + 3 * r) % 9 for r in range(world)
    ]


def walk(sharding, cursor=0, epoch=0):
    """The steps of one rank from a cursor to the end."""
    steps = []
    while (step := sharding.step_at(cursor, epoch)) is not None:
        assert step.next_cursor > cursor
        steps.append(step)
        cursor = step.next_cursor
    return steps


def positions(steps, num_samples):
    return [(step.start + i * step.stride) % num_samples for step in steps for i in range(step.size)]


def taken(group, cursor=0):
    return Counter(p for sharding in group for p in positions(walk(sharding, cursor), sharding.num_samples))


def is_every_position_once(counter, num_samples):
    return counter == Counter(range(num_samples))


@exact
@given(sizes, batch_sizes, worlds)
def test_exact_takes_every_position_once(n, batch_size, world):
    group = ranks(n, batch_size, world, Tail.EXACT)
    assert is_every_position_once(taken(group), n)
    shares = [sharding.samples_from(0) for sharding in group]
    assert max(shares) - min(shares) <= 1
    # The control: a rank that is counted twice is noticed.
    assert not is_every_position_once(taken([*group, group[0]]), n)


@exact
@given(sizes, batch_sizes, worlds, st.booleans(), st.booleans())
def test_pad_and_drop_share_as_torch_does(n, batch_size, world, drop_last, drop_partial):
    """As many samples and batches for each rank, and the same samples over all ranks, as with PyTorch's."""
    group = ranks(n, batch_size, world, Tail.DROP if drop_last else Tail.PAD, drop_partial)
    theirs = [
        DistributedSampler(range(n), world, rank, shuffle=False, drop_last=drop_last) for rank in range(world)
    ]
    loaders = [
        DataLoader(range(n), batch_size, sampler=sampler, drop_last=drop_partial) for sampler in theirs
    ]
    for sharding, sampler, loader in zip(group, theirs, loaders, strict=True):
        assert sharding.steps_from(0) == len(loader) == len(walk(sharding))
        if not drop_partial:
            assert sharding.samples_from(0) == len(sampler)
    if not drop_partial:
        assert taken(group) == Counter(i for sampler in theirs for i in sampler)


@exact
@given(sizes, batch_sizes, worlds, st.sampled_from(Tail))
def test_partial_batches_are_dropped_on_every_rank(n, batch_size, world, tail):
    group = ranks(n, batch_size, world, tail, drop_partial=True)
    assert len({len(walk(sharding)) for sharding in group}) == 1
    assert all(step.size == batch_size for sharding in group for step in walk(sharding))
    assert n - sum(taken(group).values()) < batch_size * world


@exact
@given(st.integers(0, 220), sizes, batch_sizes, worlds, st.sampled_from(Tail), st.booleans())
def test_counting_agrees_with_walking(cursor, n, batch_size, world, tail, drop_partial):
    for sharding in ranks(n, batch_size, world, tail, drop_partial):
        steps = walk(sharding, cursor)
        assert sharding.steps_from(cursor) == len(steps)
        assert sharding.samples_from(cursor) == sum(step.size for step in steps)
        assert sharding.is_over(cursor) == (sum(step.size for step in steps) == 0)


@exact
@given(sizes, batch_sizes, worlds, st.sampled_from(Tail))
def test_one_step_is_one_stretch_of_the_epoch(n, batch_size, world, tail):
    """Rank r takes what lies behind the ranks before it, and all agree where the next step begins."""
    group = ranks(n, batch_size, world, tail)
    cursor = 0
    while (steps := [sharding.step_at(cursor) for sharding in group])[0] is not None:
        expected = cursor
        for step in steps:
            assert step.start == expected
            expected += step.size
        assert len({step.next_cursor for step in steps}) == 1
        cursor = steps[0].next_cursor
    assert not any(steps)


@settings(exact, max_examples=300)
@given(
    st.integers(1, 400),
    st.sampled_from(Tail),
    st.lists(st.tuples(batch_sizes, worlds, st.integers(0, 6)), min_size=1, max_size=6),
)
def test_ranks_and_batch_sizes_may_change_at_any_step(n, tail, schedule):
    """Stopped anywhere and gone on with other ranks and batch sizes: nothing is lost, nothing repeated."""
    counter, cursor, world = Counter(), 0, 1
    runs = [*schedule, (schedule[-1][0], schedule[-1][1], 10**9)]
    for batch_size, world, num_steps in runs:
        group = ranks(n, batch_size, world, tail)
        for _ in range(num_steps):
            steps = [sharding.step_at(cursor) for sharding in group]
            if steps[0] is None:
                break
            counter.update(positions(steps, n))
            cursor = steps[0].next_cursor
    if tail is Tail.EXACT:
        assert is_every_position_once(counter, n)
    elif tail is Tail.DROP:
        assert max(counter.values(), default=1) == 1
        assert n - len(counter) < max(w for _, w, _ in schedule)
        assert set(counter) == set(range(len(counter)))
    else:
        assert set(counter) == set(range(n))
        assert sum(counter.values()) - n < max(w for _, w, _ in schedule)


def test_the_rank_is_skipped_by_samples_not_batches():
    """The control for the above: a cursor in batches of the old run, read by the new one, loses samples."""
    first = Sharding(100, 4)
    cursor = first.step_at(first.step_at(0).next_cursor).next_cursor
    in_batches = cursor // 4
    assert positions(walk(Sharding(100, 10), cursor), 100) == list(range(8, 100))
    assert positions(walk(Sharding(100, 10), in_batches * 10), 100) != list(range(8, 100))


# --- batch sizes that differ between ranks and steps ------------------------------------------------


@exact
@given(sizes, st.integers(0, 220), unequal, st.sampled_from(Tail))
def test_unequal_ranks_take_stretches_side_by_side(n, cursor, batch_sizes, tail):
    """As SPEC R3.5: rank r begins where the batches of the ranks before it end."""
    group, total = ranks(n, batch_sizes, len(batch_sizes), tail), sum(batch_sizes)
    while cursor + total <= n:
        before = 0
        for sharding, size in zip(group, batch_sizes, strict=True):
            step = sharding.step_at(cursor)
            assert (step.start, step.size, step.next_cursor) == (cursor + before, size, cursor + total)
            before += size
        cursor += total
    before = 0
    for sharding, size in zip(group, batch_sizes, strict=True):
        if (step := sharding.step_at(cursor)) is not None:
            assert (step.start, step.next_cursor) == (cursor + before, n)
            assert step.size <= size
            before += step.size


@exact
@given(sizes, st.integers(0, 199), unequal, st.sampled_from(Tail), st.booleans())
def test_tails_of_unequal_ranks(n, cursor, batch_sizes, tail, drop_partial):
    """Every rank takes as many steps, so none waits for another; what is repeated or left out is bounded."""
    cursor, world, total = min(cursor, n), len(batch_sizes), sum(batch_sizes)
    group = ranks(n, batch_sizes, world, tail, drop_partial)
    steps = [walk(sharding, cursor) for sharding in group]
    assert len(set(map(len, steps))) == 1
    assert tail is Tail.EXACT or all(step.size > 0 for own in steps for step in own)
    found, rest = taken(group, cursor), set(range(cursor, n))
    for own, size in zip(steps, batch_sizes, strict=True):
        assert {step.size for step in own[:-1] if not drop_partial} <= {size}
        assert not own or own[-1].size == size or (own[-1].size < size and not drop_partial)
    if tail is Tail.PAD:
        if not drop_partial:
            assert set(found) >= rest
        assert sum(found.values()) - len(rest) < world
    else:
        assert set(found) <= rest
        assert max(found.values(), default=1) == 1
        assert set(found) == set(range(cursor, cursor + len(found)))
    if tail is Tail.EXACT and not drop_partial:
        assert set(found) == rest
    if tail is Tail.DROP and not drop_partial:
        # Either what cannot be shared evenly, or too little for the rank with the smallest batches.
        assert len(rest) - len(found) < max(world, total / min(batch_sizes))


@st.composite
def groups(draw):
    """Ranks with one batch size, one for each, or a schedule of either; side by side, or dealt out one by one."""
    world, is_interleaved = draw(st.integers(1, 5)), draw(st.booleans())
    schedule = varying(world)
    equal = [draw(batch_sizes), lambda epoch, cursor: schedule(epoch, cursor)[0]]
    own = draw(st.lists(batch_sizes, min_size=world, max_size=world))
    batch_size = draw(st.sampled_from(equal if is_interleaved else [*equal, own, schedule]))
    tail, drop_partial = draw(st.sampled_from(Tail)), draw(st.booleans())
    return ranks(draw(sizes), batch_size, world, tail, drop_partial, is_interleaved)


@settings(exact, max_examples=200)
@given(groups(), st.integers(0, 210), st.integers(0, 3), st.sampled_from([1, 7, 8192]))
def test_counting_agrees_with_walking_whatever_the_batch_sizes(group, cursor, epoch, at_once):
    for sharding in group:
        n, steps, whole = sharding.num_samples, walk(sharding, cursor, epoch), walk(sharding, 0, epoch)
        assert list(sharding.steps(cursor, epoch)) == steps
        assert sharding.steps_from(cursor, epoch) == len(steps)
        assert sharding.samples_from(cursor, epoch) == sum(step.size for step in steps)
        assert sharding.is_over(cursor, epoch) == (sum(step.size for step in steps) == 0)
        blocks = list(sharding.positions_from(cursor, epoch, at_once))
        assert [p for block in blocks for p in block.tolist()] == positions(steps, n)
        assert {block.dtype for block in blocks} <= {np.dtype(np.int64)}
        ends = [0, *(step.next_cursor for step in whole)]
        assert [sharding.cursor_after(k, epoch) for k in range(len(ends))] == ends
        assert sharding.cursor_after(len(ends), epoch) == n
        reached = {c: min(k for k, end in enumerate(ends) if end >= c) for c in range(ends[-1] + 1)}
        assert {c: sharding.steps_before(c, epoch) for c in reached} == reached


@exact
@given(groups(), st.integers(0, 3))
def test_every_step_is_one_stretch_whatever_the_batch_sizes(group, epoch):
    """All ranks together take what lies between two cursors, however it is dealt out among them."""
    cursor, n = 0, group[0].num_samples
    while (steps := [sharding.step_at(cursor, epoch) for sharding in group])[0] is not None:
        size = sum(step.size for step in steps)
        found = Counter(positions(steps, 10**9))
        assert found == Counter(range(cursor, cursor + size))
        assert {step.next_cursor for step in steps} <= {cursor + size, n}
        if group[0].is_interleaved and size % len(group) == 0:
            hands = [positions([step], 10**9) for step in steps]
            assert hands == [list(range(cursor + r, cursor + size, len(group))) for r in range(len(group))]
        cursor = steps[0].next_cursor
    assert not any(steps)


@settings(exact, max_examples=300)
@given(
    st.integers(1, 300),
    st.sampled_from(Tail),
    st.lists(
        st.tuples(unequal, st.sampled_from(["each", "schedule", "one by one"]), st.integers(0, 6)),
        min_size=1,
        max_size=6,
    ),
)
def test_worlds_sizes_and_schedules_may_change_at_any_step(n, tail, runs):
    counter, cursor = Counter(), 0
    lost = max(max(len(own), sum(own) / min(own)) for own, _, _ in runs) + 9 * 6
    for own, kind, num_steps in [*runs, (*runs[-1][:2], 10**9)]:
        world = len(own)
        batch_size = {"each": own, "schedule": varying(world), "one by one": own[0]}[kind]
        group = ranks(n, batch_size, world, tail, is_interleaved=kind == "one by one")
        for _ in range(num_steps):
            steps = [sharding.step_at(cursor, 1) for sharding in group]
            if steps[0] is None:
                break
            counter.update(positions(steps, n))
            cursor = steps[0].next_cursor
    if tail is Tail.EXACT:
        assert is_every_position_once(counter, n)
    elif tail is Tail.DROP:
        assert max(counter.values(), default=1) == 1
        assert set(counter) == set(range(len(counter)))
        assert n - len(counter) < lost
    else:
        assert set(counter) == set(range(n))
        assert sum(counter.values()) - n < max(len(own) for own, _, _ in runs)


def test_a_batch_larger_than_any_array_is_a_whole_epoch():
    for batch_size in (2**62, 2**80, [2**40, 3]):
        world = 1 if isinstance(batch_size, int) else 2
        group = ranks(10, batch_size, world, Tail.EXACT)
        assert is_every_position_once(taken(group), 10)
        blocks = [block for sharding in group for block in sharding.positions_from(0, 0, 8192)]
        assert sorted(p for block in blocks for p in block.tolist()) == list(range(10))


def test_a_schedule_is_not_walked_through_to_begin():
    """What a state costs to load does not grow with the place it is of."""
    asked = []

    def schedule(epoch, cursor):
        asked.append(cursor)
        return 2

    sampler = ResumableRandomSampler(range(5000), 0, schedule)
    sampler.start_iter = 1000  # the control: batches are counted by walking
    assert len(asked) > 1000
    state = sampler.state_dict()
    asked.clear()
    sampler.load_state_dict(state)
    next(iter(sampler))
    assert len(asked) < 10


# --- batch sizes that are none ----------------------------------------------------------------------

BAD_SIZES = [
    (0, ValueError, "batch_size must be 1 or more, found 0"),
    (-3, ValueError, "batch_size must be 1 or more, found -3"),
    (True, TypeError, "batch_size must be an int, found the bool True"),
    (2.0, TypeError, r"batch_size must be an int, found float 2\.0"),
    ("4", TypeError, "batch_size must be an int, found str '4'"),
    (b"44", TypeError, "batch_size must be an int, found bytes"),
    (None, TypeError, "batch_size must be an int, found NoneType"),
    ({2: 3}, TypeError, "batch_size must be an int, found dict"),
    (np.array([4, 4]), TypeError, "batch_size must be an int, found ndarray"),
    ([], ValueError, r"batch_size must be one int, or one for each of the 2 ranks, found 0: \[\]"),
    ([4], ValueError, r"batch_size must be one int, or one for each of the 2 ranks, found 1: \[4\]"),
    ((1, 2, 3), ValueError, r"batch_size must be one int, .* each of the 2 ranks, found 3: \[1, 2, 3\]"),
    ([4, 0], ValueError, r"batch_size\[1\] must be 1 or more, found 0"),
    ([4, -1], ValueError, r"batch_size\[1\] must be 1 or more, found -1"),
    ([True, 4], TypeError, r"batch_size\[0\] must be an int, found the bool True"),
    ([4, 2.5], TypeError, r"batch_size\[1\] must be an int, found float 2\.5"),
    ([[4], [4]], TypeError, r"batch_size\[0\] must be an int, found list"),
    ([4, None], TypeError, r"batch_size\[1\] must be an int, found NoneType"),
]


@pytest.mark.parametrize("is_function", [False, True])
@pytest.mark.parametrize(("bad", "error", "message"), BAD_SIZES, ids=str)
def test_wrong_batch_sizes_change_nothing(bad, error, message, is_function):
    batch_size = (lambda epoch, cursor: bad) if is_function else bad
    sampler = ResumableDistributedSampler(range(50), 2, 1, batch_size=[3, 4])
    sampler.start_iter = 2
    before = sampler.sharding, sampler.state_dict(), sampler.start_iter, list(sampler)
    sampler.start_iter = 2
    for use in (
        sampler.set_batch_size,
        lambda size: create_dataloader(range(50), batch_size=size, sampler=sampler),
        lambda size: ResumableDistributedSampler(range(50), 2, 1, batch_size=size),
    ):
        with pytest.raises(error, match=message):
            use(batch_size)
    assert (sampler.sharding, sampler.state_dict(), sampler.start_iter, list(sampler)) == before


def test_unequal_batches_are_refused_where_positions_are_dealt_out_one_by_one():
    sampler = ResumableDistributedSampler(range(50), 2, 1, order="torch")
    for bad in ([3, 4], lambda epoch, cursor: [4, 3]):
        with pytest.raises(
            ValueError, match=r"batch_size must be the same on every rank, .* found \[. *, .\]"
        ):
            sampler.set_batch_size(bad)
    assert sampler.batch_size == 1
    sampler.set_batch_size(lambda epoch, cursor: [3, 3])  # the control
    assert sampler.batch_size == 3


def test_a_schedule_that_fails_later_leaves_the_loop_where_it_is():
    loader = create_dataloader(range(50), batch_size=lambda epoch, cursor: 8 if cursor < 20 else 0)
    received = []
    with pytest.raises(ValueError, match="batch_size must be 1 or more, found 0"):
        for batch in loader:
            received += batch.tolist()
    assert received == list(range(len(received)))
    assert loader.sampler.consumed == len(received) == 24


@pytest.mark.parametrize("numbers", [np.int64, np.uint8, np.uint64])
def test_sizes_may_be_of_numpy(numbers):
    sampler = ResumableDistributedSampler(
        range(50), numbers(2), numbers(1), batch_size=[numbers(3), numbers(4)]
    )
    expected = ResumableDistributedSampler(range(50), 2, 1, batch_size=(3, 4))
    assert sampler.sharding == expected.sharding
    sampler.set_batch_size(lambda epoch, cursor: numbers(3))
    assert list(sampler) == list(ResumableDistributedSampler(range(50), 2, 1, batch_size=3))
