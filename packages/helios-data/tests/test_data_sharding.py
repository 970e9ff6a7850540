"""Dealing out an epoch: every position to one rank once, also when ranks and batch sizes change under way."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from helios.data import Tail
from helios.data._sharding import Sharding

exact = settings(deadline=None, derandomize=True)  # no clock, the same examples every time
sizes = st.integers(1, 200)
batch_sizes = st.integers(1, 20)
worlds = st.integers(1, 9)


def ranks(num_samples, batch_size, world, tail, drop_partial=False):
    return [Sharding(num_samples, batch_size, rank, world, tail, drop_partial) for rank in range(world)]


def walk(sharding, cursor=0):
    """The steps of one rank from a cursor to the end."""
    steps = []
    while (step := sharding.step_at(cursor)) is not None:
        assert step.next_cursor > cursor
        steps.append(step)
        cursor = step.next_cursor
    return steps


def positions(steps, num_samples):
    return [p % num_samples for step in steps for p in range(step.start, step.start + step.size)]


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
