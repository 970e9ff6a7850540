"""Groups of overlapping byte ranges, against the definition."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from helios.chkpt._spans import components

SPANS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 8)).map(lambda s: (s[0], s[0] + s[1])), max_size=12
)


@settings(deadline=None, derandomize=True)  # no clock, the same examples every time
@given(SPANS)
def test_groups_are_the_classes_of_overlap(spans: list[tuple[int, int]]) -> None:
    label = list(range(len(spans)))
    for _ in spans:
        for i, a in enumerate(spans):
            for j, b in enumerate(spans):
                if a[0] < b[1] and b[0] < a[1]:
                    label[i] = label[j] = min(label[i], label[j])
    expected = {frozenset(i for i, x in enumerate(label) if x == y) for y in label}
    found = components(spans)
    assert {frozenset(component.members) for component in found} == expected
    for component in found:
        members = [spans[i] for i in component.members]
        assert (component.start, component.stop) == (min(a for a, _ in members), max(b for _, b in members))


def test_touching_ranges_stay_apart() -> None:
    assert [component.members for component in components([(4, 8), (0, 4)])] == [(1,), (0,)]
