"""Sibling dependencies: version bounds in a release, the neighbouring folders in a checkout.

`pip install ./packages/helios-data` in a checkout must find helios-rng beside it; a wheel that is
released must carry version bounds. HELIOS_RELEASE=1, and building from an sdist, give the bounds.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class SiblingDependencies(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        packages = Path(self.root).resolve().parent
        siblings = []
        for requirement in self.config["siblings"]:
            name = re.split(r"[<>=!~ ]", requirement, maxsplit=1)[0]
            beside = packages / name
            in_checkout = (beside / "pyproject.toml").is_file()
            if in_checkout and os.environ.get("HELIOS_RELEASE") != "1":
                siblings.append(f"{name} @ {beside.as_uri()}")
            else:
                siblings.append(requirement)
        metadata["dependencies"] = [*self.config["third-party"], *siblings]
