"""A few cases of every attack; thousands are tried by `python -m tests.reliability`.

Those that start processes of their own run with `-m long`; single mistakes and files have tests of their own elsewhere.
"""

from pathlib import Path

import pytest

from tests.long import long_except
from tests.reliability.attack import TOPICS, attack

HERE = Path(__file__).parent
SMALL: dict[str, int] = {
    "options": 12,
    "files": 10,
    "calls": 100,
    "hostile": 4,
    "long": 1,
}  # cases in a test run, where it is not FEW
FEW = 2


@pytest.mark.parametrize("name", long_except([name for name in TOPICS if (HERE / f"{name}.py").exists()], "calls"))
def test_a_few_cases_hold(name: str, tmp_path: Path) -> None:
    outcome = attack(name, SMALL.get(name, FEW), seed=1, folder=tmp_path)
    assert outcome.tried == SMALL.get(name, FEW)
    assert not outcome.lost, "\n".join(f"{case.what}: {case.wrong}" for case in outcome.lost)
