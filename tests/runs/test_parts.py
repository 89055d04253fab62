"""Parts become one table in one order, whatever ran together and whenever rows were handed over."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from initlab.runs import parts
from initlab.runs.parquet import join
from initlab.runs.parts import Part, merge
from tests.long import long_except

TENSORS = [("weight", "forward"), ("activation", "backward"), ("bias", "forward")]


def rows_of(networks: list[int], stage: str, implementation: str, steps: range) -> pd.DataFrame:
    """As a training hands them over: step by step, tensor by tensor, the networks fastest."""
    order = TENSORS if implementation == "module" else TENSORS[::-1]
    found = [
        (stage, implementation, 100 + who, step, layer, tensor, direction, who, f"{step} {layer} {tensor} {who}")
        for step in steps
        for layer in (2, 1)
        for tensor, direction in order
        for who in networks
    ]
    names = ["stage", "implementation", "seed", "step", "layer", "tensor", "direction", "network", "value"]
    return pd.DataFrame(found, columns=names).astype({"stage": "category", "implementation": "category"})


def emitted(rng: random.Random, networks: int, steps: int) -> list[pd.DataFrame]:
    """Networks in groups, one group after the other, each in pieces of steps."""
    found = []
    cuts = sorted(rng.sample(range(1, networks), rng.randint(0, networks - 1))) if networks > 1 else []
    for start, stop in zip([0, *cuts], [*cuts, networks], strict=True):
        ends = sorted(rng.sample(range(1, steps), rng.randint(0, min(4, steps - 1))))
        for a, b in zip([0, *ends], [*ends, steps], strict=True):
            who = list(range(start, stop))
            found.append(pd.concat([rows_of(who, "train", name, range(a, b)) for name in ("module", "scratch")]))
    return [frame.reset_index(drop=True) for frame in found]


@pytest.mark.parametrize("seed", long_except(range(12), *range(4)))
def test_order_does_not_hang_on_how_rows_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    networks, steps = rng.randint(1, 5), rng.randint(1, 9)
    monkeypatch.setattr(parts, "GROUP", rng.choice([1, 7, 16, 1000]))
    monkeypatch.setattr(parts, "AT_ONCE", rng.choice([1, 16, 50, 10**6]))
    (tmp_path / "parts").mkdir()
    frames = emitted(rng, networks, steps)
    if rng.random() < 0.5:  # implementations side by side, step by step
        frames = [frame.sort_values("step", kind="stable", ignore_index=True) for frame in frames]
    frames.insert(rng.randint(0, len(frames)), frames[0].iloc[:0])  # of steps that are not measured
    made = [Part.make(k, "stats", frame, {"init": "naive"}) for k, frame in enumerate(frames)]
    for part in made:
        if rng.random() < 0.5:
            part.write(tmp_path)
            part.table = None
    found = join(list(merge(tmp_path, made))).to_pandas()
    whole = pd.concat([rows_of(list(range(networks)), "train", name, range(steps)) for name in ("module", "scratch")])
    pd.testing.assert_frame_equal(found.astype(str), whole.drop(columns="network").reset_index(drop=True).astype(str))
    assert (np.diff(found["step"]) < 0).sum() <= 1


@pytest.mark.parametrize("seed", range(4))
def test_parts_of_a_killed_run_are_read_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """By a process that reads more rows together; and a column may be a constant of some parts alone."""
    rng = random.Random(seed)
    (tmp_path / "parts").mkdir()
    monkeypatch.setattr(parts, "GROUP", rng.choice([5, 7, 16]))
    for k, frame in enumerate(emitted(rng, 4, 6)):
        given = frame.assign(width=3) if rng.random() < 0.5 else frame
        Part.make(k, "stats", given, {"init": "naive", "width": 3}).write(tmp_path)
    monkeypatch.setattr(parts, "GROUP", 1000)
    parts.compact_left(tmp_path)
    found = pd.read_parquet(tmp_path / "stats.parquet")
    whole = pd.concat([rows_of(list(range(4)), "train", name, range(6)) for name in ("module", "scratch")])
    names = list(whole.columns.drop("network"))
    pd.testing.assert_frame_equal(found[names].astype(str), whole[names].reset_index(drop=True).astype(str))
    assert set(found["init"]) == {"naive"} and set(found["width"]) == {3} and not (tmp_path / "parts").exists()


def test_memory_holds_a_group_of_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many networks are trained one after the other: their rows stand side by side in the table."""
    monkeypatch.setattr(parts, "GROUP", 12)
    monkeypatch.setattr(parts, "AT_ONCE", 24)
    frames = [rows_of([who], "train", "module", range(40)) for who in range(10)]
    made = [Part.make(k, "stats", frame, {"width": 3}) for k, frame in enumerate(frames)]
    own, held = parts._split, []

    def split(pool: list[parts.Waiting], before: parts.Place) -> tuple[list[pa.Table], list[parts.Waiting]]:
        held.append(sum(len(table) for *_, table in pool))
        assert all("width" not in table.column_names for *_, table in pool)
        return own(pool, before)

    monkeypatch.setattr(parts, "_split", split)
    assert sum(map(len, merge(tmp_path, made))) == 2400 and max(held) <= 10 * 12 + 24


def test_the_more_networks_the_fewer_rows_of_each_are_read_together() -> None:
    """Eight at a time, and 200 of them: memory holds a group of each eight."""
    most = []
    for first in range(0, 200, 8):
        part = Part.make(0, "stats", rows_of(list(range(first, first + 8)), "train", "module", range(100)), {})
        most.append(max(stop - start for _, start, stop in part.groups))
    assert most[0] == 4800 and min(most) == parts.FEWEST and sum(most) < 5 * parts.GROUP


@pytest.mark.parametrize("side_by_side", [False, True])
def test_steps_are_no_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side_by_side: bool) -> None:
    """A network whose every step is a row: groups are as large as others', and the steps to show are chosen once."""
    rows = pd.concat([rows_of([0], "train", name, range(300)) for name in ("module", "scratch")])
    rows = rows[(rows["layer"] == 1) & (rows["tensor"] == "bias")].reset_index(drop=True)
    given = rows.sort_values("step", kind="stable", ignore_index=True) if side_by_side else rows
    monkeypatch.setattr(parts, "GROUP", 20)
    monkeypatch.setattr(parts, "AT_ONCE", 40)
    monkeypatch.setattr(parts, "SHOWN", 100)
    chosen: list[np.ndarray] = []
    own = parts.choose_steps

    def choose_steps(mine: Sequence[Part]) -> np.ndarray:
        chosen.append(own(mine))
        return chosen[-1]

    monkeypatch.setattr(parts, "choose_steps", choose_steps)
    part = Part.make(0, "stats", given, {})
    assert len(part.groups) == len(rows) / 20
    shown = parts.compact(tmp_path, [part])["stats"].to_pandas()
    kept = pd.read_parquet(tmp_path / "stats.parquet")
    assert kept["value"].tolist() == rows["value"].tolist() and len(chosen) == 1
    assert sorted(set(shown["step"])) == [*range(0, 300, 6), 299] and len(shown) == 2 * 51


def test_tables_without_an_order_keep_that_in_which_rows_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "GROUP", 5)
    monkeypatch.setattr(parts, "AT_ONCE", 16)
    frames = [pd.DataFrame({"layer": np.arange(40)[::-1], "measured": np.arange(40) + 40 * k}) for k in range(3)]
    pieces = list(merge(tmp_path, [Part.make(k, "theory", frame, {}) for k, frame in enumerate(frames)]))
    assert join(pieces)["measured"].to_pylist() == list(range(120)) and max(map(len, pieces)) < 16 + 5
