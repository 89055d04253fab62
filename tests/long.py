"""Parameters of tests of which most values take long: these run with `-m long`, as CI does."""

from collections.abc import Iterable
from typing import Any

import pytest


def long_except(values: Iterable[Any], *quick: Any) -> list[Any]:
    """The values, or tuples of values, for `pytest.mark.parametrize`; those that are not `quick` are marked `long`.

    >>> [len(one.marks) for one in long_except(["relu", "tanh"], "relu")]
    [0, 1]
    """
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=() if value in quick else pytest.mark.long
        )
        for value in values
    ]
