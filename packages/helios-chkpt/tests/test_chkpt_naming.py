"""Names can be read back, whatever is in them."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helios.chkpt import CheckpointName, format_name, parse_name

PIECES = st.sampled_from(
    ["_epoch_3_iter_4", "_epoch_", "_iter_", "7", "_", ".pth", "a", "é", "epoch_1_iter_2", " "]
)
TEXT = st.lists(PIECES, max_size=6).map("".join) | st.text(max_size=12)
NUMBER = st.integers(0, 10**12)


@settings(deadline=None, derandomize=True)  # no clock, the same examples every time
@given(TEXT, NUMBER, NUMBER, TEXT)
def test_what_can_be_formatted_is_parsed_back(run: str, epoch: int, iteration: int, metadata: str) -> None:
    name = CheckpointName(run, epoch, iteration, metadata)
    try:
        text = format_name(name)
    except ValueError:
        assume(False)
    assert parse_name(text) == name


@settings(deadline=None, derandomize=True)  # no clock, the same examples every time
@given(TEXT)
def test_what_is_parsed_is_formatted_back(text: str) -> None:
    for filename in (text, f"{text}.pth", f"r_epoch_1_iter_2{text}.pth"):
        name = parse_name(filename)
        if name is not None:
            try:
                assert format_name(name) == filename
            except ValueError as error:
                assert "cannot be part" in str(error)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (CheckpointName("run", 0, 0), "run_epoch_0_iter_0.pth"),
        (CheckpointName("run", 3, 100, "accuracy_0.98"), "run_epoch_3_iter_100_accuracy_0.98.pth"),
        (CheckpointName("a_epoch_3_iter_4", 5, 6), "a_epoch_3_iter_4_epoch_5_iter_6.pth"),
        (CheckpointName("a", 1, 2, "_x.pth"), "a_epoch_1_iter_2__x.pth.pth"),
        (CheckpointName("a", 1, 2, "x_epoch_3_iter_4y"), "a_epoch_1_iter_2_x_epoch_3_iter_4y.pth"),
    ],
)
def test_names(name: CheckpointName, text: str) -> None:
    assert format_name(name) == text
    assert parse_name(text) == name


@pytest.mark.parametrize(
    "filename",
    [
        "run.pth",
        "_epoch_1_iter_2.pth",
        "r_epoch_1_iter_2.pt",
        "r_epoch_01_iter_2.pth",
        "r_epoch_-1_iter_2.pth",
        "r_epoch_1_iter_2_.pth",
        "r_epoch_1_iter_2x.pth",
        "a/r_epoch_1_iter_2.pth",
        "r\n_epoch_1_iter_2.pth",
        "",
        f"{'r' * 250}_epoch_1_iter_2.pth",
        "r_epoch_\u0661_iter_2.pth",
        "r_epoch_1_iter_2.pth.tmp",
    ],
)
def test_other_files_are_not_checkpoints(filename: str) -> None:
    assert parse_name(filename) is None


@pytest.mark.parametrize(
    "metadata", ["epoch_3_iter_4", "x_epoch_3_iter_4", "epoch_3_iter_4_y", "a_epoch_0_iter_0_b"]
)
def test_metadata_that_would_be_read_as_the_numbers(metadata: str) -> None:
    with pytest.raises(ValueError, match="metadata"):
        format_name(CheckpointName("run", 1, 2, metadata))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("", 1, 2), ValueError, "run_name"),
        (("a/b", 1, 2), ValueError, "run_name"),
        (("a\\b", 1, 2), ValueError, "run_name"),
        (("a\0b", 1, 2), ValueError, "run_name"),
        (("a", 1, 2, "x\ny"), ValueError, "metadata"),
        (("\ud800", 1, 2), ValueError, "run_name"),
        (("a", -1, 2), ValueError, "epoch"),
        (("a", 1, -2), ValueError, "iteration"),
        (("a" * 240, 1, 2), ValueError, "bytes"),
        (("é" * 120, 1, 2), ValueError, "bytes"),
        ((1, 1, 2), TypeError, "run_name"),
        (("a", True, 2), TypeError, "epoch"),
        (("a", 1, 2.0), TypeError, "iteration"),
        (("a", 1, 2, None), TypeError, "metadata"),
    ],
)
def test_bad_parts(arguments: tuple[object, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        format_name(CheckpointName(*arguments))  # type: ignore[arg-type]


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="name"):
        format_name("run")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="filename"):
        parse_name(b"run")  # type: ignore[arg-type]
