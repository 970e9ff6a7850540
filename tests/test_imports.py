"""What importing a package loads, and what packages may know of each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parent.parent / "packages"
# Beyond torch and what torch has loaded, each may load itself, its siblings and these.
MAY_LOAD = {
    "helios.core.rng": {"helios", "numpy"},
    "helios.data": {"helios", "numpy"},
    "helios.chkpt": {"helios", "packaging"},
    "helios.chkpt_migrator": {"helios", "packaging", "tqdm"},
    "helios.trainer": {"helios", "numpy", "packaging", "tqdm"},
}
LOADED = """
import sys
import torch, torch.utils.data
before = set(sys.modules)
import {package}
standard = sys.stdlib_module_names
print(*sorted({{m.split(".")[0] for m in set(sys.modules) - before}} - standard - {{"torch"}}))
"""


@pytest.mark.parametrize("package", MAY_LOAD)
def test_an_import_loads_nothing_heavy(package):
    code = LOADED.format(package=package)
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(loaded) <= MAY_LOAD[package]


def test_control_tensorboard_would_be_noticed():
    code = LOADED.format(package="torch.utils.tensorboard")
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "tensorboard" in loaded


def package_of(module: str) -> str:
    """The part of a dotted name that one distribution owns."""
    parts = module.replace("chkpt_migrator", "chkpt").split(".")
    return ".".join(parts[:3] if parts[:2] == ["helios", "core"] else parts[:2])


def test_no_package_reaches_into_the_private_modules_of_another():
    num_imports = 0
    for path in PACKAGES.glob("*/src/helios/**/*.py"):
        own = package_of(str(path).split("/src/")[1].removesuffix(".py").replace("/", "."))
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                num_imports += name.startswith("helios")
                if name.startswith("helios") and package_of(name) != own:
                    assert "._" not in name, f"{path.name} imports {name}"
    assert num_imports > 50


def test_namespaces_have_no_init():
    for package in PACKAGES.iterdir():
        assert not (package / "src/helios/__init__.py").exists()
        assert not (package / "src/helios/core/__init__.py").exists()
