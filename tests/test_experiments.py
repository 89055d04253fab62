"""Every study composes, says what it is, and runs at toy size."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import initlab

ROOT = Path(initlab.__file__).parents[1]
STUDIES = sorted((ROOT / "experiments").glob("*.yaml"))
pytestmark = pytest.mark.skipif(not STUDIES, reason="the studies stand in the repository")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_says_what_it_asks_and_runs(path: Path, lab: Callable[..., tuple[int, str, str]]) -> None:
    text = path.read_text(encoding="utf-8")
    for word in (
        "# Question: ",
        "# Expected: ",
        "# Cost: ",
        f"# Launch: python -m initlab -cd experiments -cn {path.stem}",
    ):
        assert word in text
    assert f"`{path.stem}`" in (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    toy = ("depth=3", "seeds=1", "train.steps=2", "train.depth=2", "plots=false")
    code, _, err = lab("-cd", str(path.parent), "-cn", path.stem, *toy)
    assert code == 0, err
    assert Path("outputs", path.stem).is_dir()
    swept = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    frame = initlab.read("outputs/**")
    for key, values in swept.items():
        assert sorted(frame[key].unique()) == sorted(values.split(","))


def test_conf_has_no_sweeps() -> None:
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert "MULTIRUN" not in path.read_text(encoding="utf-8")
