"""What a pickle of tensors and plain values may call, and what each call stands for. Nothing is called."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

from helios.chkpt._format.dtypes import DTYPES, ITEM_BYTES, OTHER_GLOBALS
from helios.chkpt._format.values import Call, Global, Storage, Tensor

_LAYOUTS = frozenset(
    f"torch.{name}"
    for name in ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")
)
_MAX_NUMBER = 2**63  # what torch counts elements with


class MalformedError(ValueError):
    """The bytes are not a pickle of this format; says what was found."""


def _ordered_dict(args: tuple[object, ...]) -> object:
    if args:
        raise MalformedError("an OrderedDict with arguments")
    return OrderedDict()


def _counter(args: tuple[object, ...]) -> object:
    (counts,) = args
    if type(counts) is not dict:
        raise MalformedError("a Counter of something else than a dict")
    return Counter(counts)


def _bytes(args: tuple[object, ...]) -> bytes:
    text, encoding = args
    if type(text) is not str or encoding != "latin1":
        raise MalformedError("bytes in an encoding other than latin1")
    return text.encode("latin1")


def _empty_bytes(args: tuple[object, ...]) -> bytes:
    if args:  # Python writes b"" as bytes(), and all others with _codecs.encode
        raise MalformedError("bytes of something else than nothing")
    return b""


def _complex(args: tuple[object, ...]) -> complex:
    real, imaginary = args
    if type(real) is not float or type(imaginary) is not float:
        raise MalformedError("a complex number of something else than two floats")
    return complex(real, imaginary)


def _set(args: tuple[object, ...]) -> object:
    (items,) = args
    if type(items) is not list:
        raise MalformedError("a set of something else than a list")
    return set(items)


def _bytearray(args: tuple[object, ...]) -> bytearray:
    match args:
        case ():
            return bytearray()
        case (str(text), "latin-1"):
            return bytearray(text, "latin-1")
        case (bytes(data),):
            return bytearray(data)
    raise MalformedError("a bytearray of something else than text")


def _dense(args: tuple[object, ...]) -> Tensor:
    storage, offset, shape, stride, requires_grad, *rest = args
    if not isinstance(storage, Storage) or storage.is_untyped:
        raise MalformedError("a tensor without a typed storage")
    if len(rest) > 1:
        raise MalformedError("a conjugate or negative view")
    return _tensor(storage, storage.dtype, offset, shape, stride, requires_grad)


def _dense_untyped(args: tuple[object, ...]) -> Tensor:
    storage, offset, shape, stride, requires_grad, _hooks, dtype, *rest = args
    if not isinstance(storage, Storage) or not storage.is_untyped or rest:
        raise MalformedError("a tensor without an untyped storage")
    if not isinstance(dtype, Global) or dtype.module != "torch" or dtype.name not in ITEM_BYTES:
        raise MalformedError(f"a tensor of the dtype {dtype!s:.80}")
    return _tensor(storage, dtype.name, offset, shape, stride, requires_grad)


def _tensor(
    storage: Storage, dtype: str, offset: object, shape: object, stride: object, requires_grad: object
) -> Tensor:
    sizes, steps = _numbers(shape), _numbers(stride)
    (start,) = _numbers((offset,))
    if len(sizes) != len(steps) or type(requires_grad) is not bool:
        raise MalformedError("a tensor with a malformed shape")
    if 0 not in sizes:
        count = 1
        for size in sizes:
            count *= size
            if count >= _MAX_NUMBER:
                raise MalformedError("a tensor with more elements than can be counted")
        last = start + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
        if (last + 1) * ITEM_BYTES[dtype] > storage.num_bytes:
            raise MalformedError(f"a tensor that reaches beyond its {storage.num_bytes} bytes")
    return Tensor(storage, dtype, start, sizes, steps, requires_grad)


def _quantised(args: tuple[object, ...]) -> Call:
    storage, offset, shape, stride, _params, requires_grad, _hooks = args
    if not isinstance(storage, Storage):
        raise MalformedError("a quantised tensor without a storage")
    _tensor(storage, storage.dtype, offset, shape, stride, requires_grad)  # checks
    return Call(Global("torch._utils", "_rebuild_qtensor"), args)


def _numbers(values: object) -> tuple[int, ...]:
    if isinstance(values, Call) and str(values.function) == "torch.Size":
        (values,) = values.args
    if type(values) is not tuple or not all(type(v) is int and 0 <= v < _MAX_NUMBER for v in values):
        raise MalformedError("a tensor with a malformed shape")
    return values


def _layout(args: tuple[object, ...]) -> Call:
    (name,) = args
    if type(name) is not str or name not in _LAYOUTS:  # torch would import what is named `torch._inductor`
        raise MalformedError(f"the layout {name!r:.80}")
    return Call(Global("torch.serialization", "_get_layout"), args)


MAKERS: dict[str, Callable[[tuple[object, ...]], object]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    "_codecs.encode": _bytes,
    "builtins.complex": _complex,
    "builtins.set": _set,
    "builtins.bytes": _empty_bytes,
    "builtins.bytearray": _bytearray,
    "torch._utils._rebuild_tensor_v2": _dense,
    "torch._utils._rebuild_tensor_v3": _dense_untyped,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch.serialization._get_layout": _layout,
}
"""By name, functions from a call's arguments to what it stands for; MalformedError if it has others."""

_CALLED_LATER = frozenset(
    {"torch.Size", "torch.device", "torch._utils._rebuild_parameter", "torch._utils._rebuild_sparse_tensor"}
)

KNOWN = frozenset(
    {*MAKERS, *_CALLED_LATER, "torch.storage.UntypedStorage"}
    | {f"torch.{name}" for name in (*ITEM_BYTES, *OTHER_GLOBALS, *DTYPES)}
)
"""Names that stand for plain values and tensors. All else is foreign."""
