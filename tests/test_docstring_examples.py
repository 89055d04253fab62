"""Every example in a docstring gives what it says."""

import doctest
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import initlab

PACKAGE = Path(initlab.__file__).parent


def modules() -> list[str]:
    """Modules with examples, without those that need Triton where it is missing."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if ">>> " in text and ("import triton" not in text or find_spec("triton")):
            found.append(
                ".".join(["initlab", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
            )
    return found


@pytest.mark.parametrize("name", modules())
def test_examples_of_docstrings(name: str) -> None:
    failed, tried = doctest.testmod(import_module(name))
    assert tried and not failed
