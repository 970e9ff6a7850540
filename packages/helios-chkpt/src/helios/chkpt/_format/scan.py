"""Which names a pickle refers to, when it is too strange to be read: for the message that refuses it."""

from __future__ import annotations

import pickletools
from collections import deque


def names_in(data: bytes) -> list[str]:
    """``module.name`` of what a pickle of any protocol would import, as far as it can be read; once each."""
    names: dict[str, None] = {}
    texts: deque[str] = deque(maxlen=2)  # what STACK_GLOBAL takes, if nothing but text is on the stack
    memo: dict[object, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "INST"):
                module, _, name = str(argument).partition(" ")
                names[_full(module, name)] = None
            elif opcode.name == "STACK_GLOBAL":
                names[_full(*texts)] = None
            elif opcode.name.startswith("EXT"):
                names[f"extension.{argument}"] = None
            elif "PUT" in opcode.name or opcode.name == "MEMOIZE":
                if texts:
                    memo[len(memo) if argument is None else argument] = texts[-1]
            elif "GET" in opcode.name:
                texts.append(memo.get(argument, "?"))
            elif isinstance(argument, str):
                texts.append(argument[:200])
    except Exception:  # pickletools raises whatever the bytes lead it to
        return list(names)
    return list(names)


def _full(module: str, name: str) -> str:
    return f"{'builtins' if module == '__builtin__' else module}.{name}"
