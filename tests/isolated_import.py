"""Run by `python -I` in a fresh environment, outside the checkout: PACKAGE [SIBLING ...].

Imports every module that the installed package lists, and checks that nothing of Helios is there that it
did not declare, and that no namespace became a package.
"""

import importlib
import importlib.metadata
import sys
from pathlib import Path


def main(name: str, siblings: list[str]) -> None:
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    helios = {each for each in installed if each.startswith("helios")}
    assert helios == {name, *siblings}, f"installed: {sorted(helios)}"
    files = importlib.metadata.files(name) or []
    own = [Path(str(file)) for file in files if file.suffix == ".py"]
    assert own, f"{name} lists no modules"
    typed = [file for file in files if file.name == "py.typed"]
    assert typed, f"{name} has no py.typed"
    for path in own:
        assert path not in (Path("helios/__init__.py"), Path("helios/core/__init__.py")), path
        if path.name == "__main__.py":
            continue  # runs when imported
        parts = path.with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        imported = importlib.import_module(module)
        assert Path(imported.__file__ or "").is_relative_to(sys.prefix), f"{module} is not from the wheel"
    assert importlib.import_module("helios").__file__ is None, "helios must be a namespace"
    print(f"{name}: {len(own)} modules, with {', '.join(sorted(siblings)) or 'no sibling'}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
