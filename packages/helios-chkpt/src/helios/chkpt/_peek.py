"""A look into a pickle that makes no object of it: which classes it names, and what version it says."""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field

_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUTS = ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE")
_GETS = ("BINGET", "LONG_BINGET", "GET")
_FILLS = (
    "SETITEM",
    "SETITEMS",
    "APPEND",
    "APPENDS",
    "ADDITEMS",
    "BUILD",
)  # what they fill stays on the stack


@dataclass(frozen=True)
class Peek:
    """What a pickle says about itself.

    Attributes:
        keys: keys of the outermost dict that are text or enum members made from text.
        version: the text under its key ``version``, None if there is none.
        globals: ``module.name`` of everything it would import, in order.
    """

    keys: frozenset[str]
    version: str | None
    globals: tuple[str, ...]


@dataclass(eq=False)
class _Dict:
    items: list[tuple[object, object]] = field(default_factory=list)  # keys need not be hashable here


@dataclass(eq=False)
class _Unknown:
    text: str | None = None  # the only argument of the call that would make it, if that is a text


_MARK = _Unknown()


def peek(data: bytes) -> Peek | None:
    """Read the opcodes of a pickle; None if they make no sense. Nothing is imported, called or built."""
    names: list[str] = []
    try:
        top = _follow(data, names)
    except Exception:  # pickletools raises whatever the bytes lead it to
        return None
    found: dict[str, object] = {}
    for key, value in top.items if isinstance(top, _Dict) else ():
        text = key.text if isinstance(key, _Unknown) else key
        if isinstance(text, str):
            found[text] = value
    version = found.get("version")
    return Peek(frozenset(found), version if isinstance(version, str) else None, tuple(names))


def _follow(data: bytes, names: list[str]) -> object:
    """The outermost object, as far as it is followed; appends to `names` what would be imported."""
    stack: list[object] = []
    memo: dict[int, object] = {}
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STOP":
            return stack[-1]
        if opcode.name in _PUTS:
            memo[len(memo) if argument is None else int(argument)] = stack[-1]
        elif opcode.name in _GETS:
            assert argument is not None
            stack.append(memo[int(argument)])
        elif opcode.name == "MARK":
            stack.append(_MARK)
        elif opcode.name == "EMPTY_DICT":
            stack.append(_Dict())
        else:
            stack += _effect(opcode, argument, _take(stack, opcode), names)
    raise ValueError("a pickle without an end")


def _take(stack: list[object], opcode: pickletools.OpcodeInfo) -> list[object]:
    """Take from the stack what an opcode takes; the mark itself is left out."""
    count = len(opcode.stack_before)
    taken: list[object] = []
    if pickletools.markobject in opcode.stack_before:
        count = opcode.stack_before.index(pickletools.markobject)
        while (item := stack.pop()) is not _MARK:
            taken.append(item)
    taken += [stack.pop() for _ in range(count)]
    return taken[::-1]


def _effect(
    opcode: pickletools.OpcodeInfo, argument: object, taken: list[object], names: list[str]
) -> list[object]:
    """What an opcode puts on the stack in place of what it took."""
    if opcode.name in _CONSTANTS:
        return [_CONSTANTS[opcode.name]]
    if opcode.name in ("GLOBAL", "INST"):
        names.append(str(argument).replace(" ", "."))
    elif opcode.name == "STACK_GLOBAL":
        names.append(".".join(map(str, taken)))
    elif opcode.name in _FILLS:
        if isinstance(taken[0], _Dict) and opcode.name.startswith("SETITEM"):
            taken[0].items += zip(taken[1::2], taken[2::2], strict=True)
        return taken[:1]
    elif opcode.name.startswith("TUPLE"):
        return [tuple(taken)]
    elif opcode.name in ("REDUCE", "NEWOBJ"):
        match taken[1]:
            case (str() as text,):
                return [_Unknown(text)]
    elif argument is not None and not taken:
        return [argument]
    return [_Unknown() for _ in opcode.stack_after]
