"""The pages in packages/*/docs: their code runs, and their pictures are what the script draws now."""

import re
import runpy
from pathlib import Path

import pytest

DATA_DOCS = Path(__file__).parent.parent / "packages" / "helios-data" / "docs"
PAGE = (DATA_DOCS / "how-it-works.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PICTURES = runpy.run_path(str(DATA_DOCS / "draw.py"))["PICTURES"]


def test_there_is_something_to_test():
    assert len(BLOCKS) == 3
    assert set(re.findall(r"\(pictures/(\w+)\.svg\)", PAGE)) == set(PICTURES)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_code_runs(block):
    exec(block, {"__name__": "page"})


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_show_what_is(name):
    assert (DATA_DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == PICTURES[name]()
