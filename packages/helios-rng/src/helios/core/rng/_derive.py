"""Seeds derived from a seed and a path, by a keyed hash.

`seed + epoch` makes (0, 1) and (1, 0) the same stream. Here the seed and every element of the path are
encoded with their type and length, so that two different paths never hash the same bytes, and hashed with
BLAKE2b (RFC 7693), whose `person` field separates this use from any other. `DERIVATION` names the
encoding; the tests freeze its values.
"""

import hashlib
import operator

DERIVATION = "helios-seed-v1"
_LENGTH_BYTES = 8


def _encode(name: str, element: object) -> bytes:
    if isinstance(element, str):
        tag, body = b"s", element.encode("utf-8", "surrogatepass")
    elif isinstance(element, bool):
        raise TypeError(f"{name} must be an int or a str, found the bool {element!r}")
    else:
        try:
            number = operator.index(element)  # type: ignore[arg-type]  # NumPy's integers count as ints
        except TypeError:
            raise TypeError(
                f"{name} must be an int or a str, found {type(element).__name__} {element!r}"
            ) from None
        tag, body = b"i", number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return tag + len(body).to_bytes(_LENGTH_BYTES, "little") + body


def derive_bytes(seed: int, *path: int | str, num_bytes: int = 32) -> bytes:
    """Derive key material from a seed and a path.

    Args:
        seed: any int.
        *path: ints or strs that say what the bytes are for, such as `("shuffle", epoch)`.
        num_bytes: how many bytes, 1 to 64. Another length gives unrelated bytes.

    Returns:
        `num_bytes` bytes, uniform and independent for different (seed, path).

    Raises:
        TypeError: the seed is not an int, or an element of the path is neither int nor str.
        ValueError: `num_bytes` is not in 1..64.
    """
    if isinstance(seed, str):
        raise TypeError(f"seed must be an int, found the str {seed!r}")
    if not 1 <= num_bytes <= hashlib.blake2b.MAX_DIGEST_SIZE:
        raise ValueError(f"num_bytes must be 1 to 64, found {num_bytes}")
    message = _encode("seed", seed) + b"".join(_encode(f"path[{i}]", p) for i, p in enumerate(path))
    return hashlib.blake2b(message, digest_size=num_bytes, person=DERIVATION.encode()).digest()


def derive_seed(seed: int, *path: int | str) -> int:
    """Derive a 64-bit seed from a seed and a path.

    Args:
        seed: any int.
        *path: ints or strs that say what the seed is for, such as `("rank", 3)`. No two paths alias:
            `("1",)`, `(1,)` and `(1, 0)` give unrelated seeds, and so do (0, 1) and (1, 0) as (seed, epoch).

    Returns:
        An int in [0, 2**64), fit for `torch.manual_seed`, `random.seed` and `seed_rngs`.

    Raises:
        TypeError: the seed is not an int, or an element of the path is neither int nor str.
    """
    return int.from_bytes(derive_bytes(seed, *path, num_bytes=8), "little")
