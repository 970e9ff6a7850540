"""What differs in two checkpoints, down to the elements of a tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from helios.chkpt._arguments import as_path
from helios.chkpt._comparison._difference import Difference, DifferenceKind
from helios.chkpt._comparison._tensors import Side, UncountableError, compare_elements, is_known_equal
from helios.chkpt._comparison._walk import TensorPair, compare_states
from helios.chkpt._format.archive import open_file
from helios.chkpt._format.values import Tensor
from helios.chkpt._inspect import tied
from helios.chkpt._naming import main_file
from helios.chkpt._places import Place, brief, shape_text
from helios.chkpt._read import Contents, read_contents
from helios.chkpt._sharded.manifest import check_files, filled, read_shards


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> list[Difference]:
    """Say what differs in two checkpoints; nothing in them is imported or called.

    Tensors whose records have equal SHA-256 digests in both manifests are not read. All others are first checked
    against their CRC-32 and then compared bit by bit, a few MiB at a time. torch is imported only if some differ.
    Strides are not compared, and a tensor counts as tied to another if they overlap.

    A folder that `save_sharded` wrote is compared as `load` gives it, so it may be equal to a file. Unless all shards
    of both have equal digests, they are checked against these, and torch reads the tensors in them, one at a time.

    Args:
        a: a file, of this release or of an earlier one, or a folder with shards.
        b: another.

    Returns:
        The differences, in the order of `a`; empty if `load` gives equal states.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: a file cannot be read.
        VersionTooNewError: a file is of a later major release.
        CheckpointError: another of its subclasses, if one is no checkpoint or what was read of it is damaged.
        TypeError, ValueError: `a` or `b` is no path.
    """
    paths = as_path("a", a), as_path("b", b)
    with ExitStack() as stack:
        files = [stack.enter_context(open_file(main_file(path))) for path in paths]
        contents = [read_contents(file, main_file(path)) for file, path in zip(files, paths, strict=True)]
        for content in contents:
            content.check_schema()
        sides = [_side(*item) for item in zip(files, contents, paths, strict=True)]
        found = compare_states(contents[0].values, contents[1].values)
        return _compare_scores(sides[0], sides[1]) + _compare_pairs(sides[0], sides[1], found)


def _side(file: IO[bytes], contents: Contents, path: Path) -> Side:
    """One side; of a folder, tensors in shards get into their places in its values."""
    if main_file(path) == path:
        return Side(file, contents.archive)
    shards = read_shards(contents.values, main_file(path))
    filled(contents.values, shards, main_file(path))
    check_files(path, shards)
    return Side(file, contents.archive, path, shards)


def _compare_scores(a: Side, b: Side) -> list[Difference]:
    """The score is in the manifest, not in the state, but retention goes by it."""
    scores = [None if side.archive.manifest is None else side.archive.manifest.score for side in (a, b)]
    if scores[0] == scores[1]:
        return []
    place = Place(Place(None, "manifest"), "score")
    return [Difference(place, DifferenceKind.VALUE, brief(scores[0]), brief(scores[1]))]


def _compare_pairs(a: Side, b: Side, found: Sequence[Difference | TensorPair]) -> list[Difference]:
    """Put what differs in the tensors in the place of their pairs."""
    pairs = [item for item in found if isinstance(item, TensorPair)]
    unknown = [
        pair
        for pair in pairs
        if (pair.a.dtype, pair.a.shape) == (pair.b.dtype, pair.b.shape)
        and not is_known_equal(a, pair.a, b, pair.b)
    ]
    a.check([pair.a for pair in unknown])
    b.check([pair.b for pair in unknown])
    firsts = (
        _first_places(pairs, [pair.a for pair in pairs]),
        _first_places(pairs, [pair.b for pair in pairs]),
    )
    to_compare = set(map(id, unknown))
    differences: list[Difference] = []
    number = 0
    for item in found:
        if isinstance(item, Difference):
            differences.append(item)
            continue
        differences += _compare_properties(item, firsts[0][number], firsts[1][number])
        number += 1
        if id(item) in to_compare:
            differences += _compare_values(a, b, item)
    return differences


def _first_places(pairs: Sequence[TensorPair], tensors: Sequence[Tensor]) -> list[Place]:
    """For each tensor the place of the first that it is tied to; its own if to none."""
    places = [pair.place for pair in pairs]
    for first, *others in tied(tensors):
        for other in others:
            places[other] = places[first]
    return places


def _compare_properties(pair: TensorPair, first_a: Place, first_b: Place) -> list[Difference]:
    found: list[Difference] = []
    if pair.a.dtype != pair.b.dtype:
        found.append(Difference(pair.place, DifferenceKind.DTYPE, pair.a.dtype, pair.b.dtype))
    if pair.a.shape != pair.b.shape:
        shapes = shape_text(pair.a.shape), shape_text(pair.b.shape)
        found.append(Difference(pair.place, DifferenceKind.SHAPE, shapes[0], shapes[1]))
    if first_a is not first_b:
        ties = ["untied" if first is pair.place else f"tied to {first}" for first in (first_a, first_b)]
        found.append(Difference(pair.place, DifferenceKind.TIED, ties[0], ties[1]))
    return found


def _compare_values(a: Side, b: Side, pair: TensorPair) -> list[Difference]:
    num_elements = math.prod(pair.a.shape)
    text = brief(pair.a)
    try:
        counts = compare_elements(a, pair.a, b, pair.b)
    except UncountableError:
        return [Difference(pair.place, DifferenceKind.VALUES, text, num_elements=num_elements)]
    if counts is None:
        return []
    return [
        Difference(
            pair.place,
            DifferenceKind.VALUES,
            text,
            num_elements=num_elements,
            num_differing=counts.num_differing,
            max_abs=counts.max_abs,
            num_nan=counts.num_nan,
        )
    ]
