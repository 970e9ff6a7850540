"""The name of a run, which becomes part of the names of its checkpoints and logs."""

import os

_MAX_BYTES = 150  # a file name has 255: the rest is for epoch, iteration and the user's metadata


def check_name(argument: str, name: object) -> None:
    """Check an argument that names a run; it may be empty.

    Raises:
        TypeError: the name is not a str.
        ValueError: no file name can hold it.
    """
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a str, found {type(name).__name__} {name!r}")
    if "/" in name or "\\" in name or not name.isprintable():
        raise ValueError(
            f"{argument} becomes part of file names: it must be printable, without / and \\, found {name!r}"
        )
    if len(os.fsencode(name)) > _MAX_BYTES:
        raise ValueError(
            f"{argument} becomes part of file names: it must have at most {_MAX_BYTES} bytes, "
            f"found {len(os.fsencode(name))} in {name!r}"
        )
