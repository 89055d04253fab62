"""The order of rows: the same whatever ran together, and whenever rows were handed over."""

import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import initlab
from initlab.stats.buffer import RowBuffer
from initlab.stats.keys import KEY_COLUMNS
from initlab.tasks import train as training
from initlab.tasks.ensemble import plan
from tests.long import long_except

SEEDS = [3, 0, 5, 1, 2]
Tables = dict[str, pd.DataFrame]


def stacked() -> Tables:
    return {"stats": initlab.stack(["naive", "kaiming"] * 2 + ["small"], depth=20, width=6, batch=4, seeds=SEEDS)}


def trained() -> Tables:
    how = {"depth": 2, "width": 4, "batch": 8, "steps": 6, "seeds": SEEDS, "histograms": True, "drift": True}
    return initlab.train("digits", "lsuv", **how)  # type: ignore[no-any-return]


def named(frame: pd.DataFrame) -> pd.DataFrame:
    names = [name for name in (*KEY_COLUMNS, "init", "attempt") if name in frame]
    return frame[names].astype(str)


@pytest.mark.parametrize("measure", [stacked, trained])
@pytest.mark.parametrize("seed", range(4))
def test_groups_and_flushes_leave_the_order(
    monkeypatch: pytest.MonkeyPatch, measure: Callable[[], Tables], seed: int
) -> None:
    whole = measure()
    rng = random.Random(seed)
    size = rng.choice([1, 2, 3, 4])
    monkeypatch.setattr(plan, "CACHED", size)
    monkeypatch.setattr(training, "CACHED", size)
    monkeypatch.setattr(RowBuffer, "due", lambda self: len(self) > 0 and rng.random() < 0.5)
    split = measure()
    assert set(split) == set(whole)
    for name, frame in whole.items():
        pd.testing.assert_frame_equal(named(split[name]), named(frame))
    first = named(whole["stats"])
    assert first["seed"][: len(SEEDS)].tolist() == [str(one) for one in SEEDS]


@pytest.mark.parametrize("task", long_except(["stack", "train", "lab"], "lab"))
def test_a_run_has_the_same_order(
    lab: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Its files too, with the predictions."""
    words = (
        "sweep.init=[naive,lsuv]",
        "sweep.seed=[4,0,2]",
        "depth=6",
        "width=5",
        "batch=4",
        "plots=false",
        "report=false",
    )
    words += (f"task={task}", "train.steps=5", "train.width=4", "train.batch=8", "histograms=true")
    assert lab(*words, "hydra.run.dir=whole")[0] == 0
    rng = random.Random(0)
    monkeypatch.setattr(plan, "CACHED", 2)
    monkeypatch.setattr(training, "CACHED", 2)
    monkeypatch.setattr(RowBuffer, "due", lambda self: len(self) > 0 and rng.random() < 0.5)
    assert lab(*words, "hydra.run.dir=split")[0] == 0
    tables = sorted(path.name for path in Path("whole").glob("*.parquet"))
    assert tables == sorted(path.name for path in Path("split").glob("*.parquet")) and "theory.parquet" in tables
    for name in tables:
        one, other = (named(pd.read_parquet(Path(folder, name))) for folder in ("whole", "split"))
        pd.testing.assert_frame_equal(one, other)
