"""The distance of two sides: a law of its own, then what `compare` makes of run folders."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import initlab
from initlab.errors import UsageError
from initlab.runs import distance
from initlab.runs.compare import compare
from initlab.runs.distance import Side, first_of_each, join
from initlab.runs.recorder import Recorder

NORMAL = np.random.default_rng(0)


def side(values: np.ndarray, seeds: list[int]) -> Side:
    """values (keys, seeds) of one statistic."""
    keys, count = values.shape
    return first_of_each(Side(np.repeat(np.arange(keys), count), np.tile(seeds, keys), values.reshape(-1, 1)))[0]


def z(a: np.ndarray, b: np.ndarray, other_seeds: bool = False, statistic: str = "mean") -> np.ndarray:
    n, m = a.shape[1], b.shape[1]
    seeds = list(range(n, n + m)) if other_seeds else list(range(m))
    return join(side(a, list(range(n))), side(b, seeds), [statistic], 2.0**-23).z[:, 0]


def test_many_networks_are_compared_in_standard_deviations() -> None:
    a = NORMAL.normal(5, 2, (1, 4000))
    shifted = a + 3 * a.std()
    assert z(a, shifted) == pytest.approx(np.full(4000, 3.0), rel=0.01)  # of 4000 a spread is known to 1 %
    assert z(a, NORMAL.normal(5, 2, (1, 4000)) + 6, other_seeds=True) == pytest.approx([3.0], rel=0.05)


def test_a_spread_of_few_networks_is_not_trusted() -> None:
    """By chance alone 4 is not passed in thousands of places; without Student's law it is, again and again."""
    a, b = NORMAL.normal(size=(5000, 2)), NORMAL.normal(size=(5000, 2))
    spread = np.sqrt((a.var(axis=1, ddof=1) + b.var(axis=1, ddof=1)) / 2)
    assert (np.abs(a.mean(axis=1) - b.mean(axis=1)) / spread > 4).mean() > 0.02
    assert (z(a, b, other_seeds=True) > 4).sum() <= 3  # P(t_2 > 208 sqrt(1)) is 1 in 40,000 places


def test_wallace_is_near_students_law() -> None:
    """P(|t_4| > 8.61) = 0.001 = P(|normal| > 3.29): for x = 8.61 and nu = 4 the distance must say so."""
    nu = np.array([[4.0]])
    x = np.array([[8.610]])
    found, _ = distance._distance(x, np.zeros((1, 1)), x, np.zeros((1, 1)), np.ones((1, 1)), nu, 2.0**-23)
    assert found[0, 0] == pytest.approx(3.29, rel=0.02)


def test_scales_are_compared_in_their_logarithm() -> None:
    values = np.exp(NORMAL.normal(0, 2, (1, 2000)))
    assert z(values, values * math.exp(6), statistic="std") == pytest.approx(np.full(2000, 3.0), rel=0.05)
    # The spread of a lognormal is that of its tail: some networks are ten spreads away and others none.
    assert z(values, values * math.exp(6), statistic="mean").max() > 10


@pytest.mark.parametrize(("a", "b"), [(math.nan, math.nan), (math.inf, math.inf), (0.0, -0.0), (5e-324, 5e-324)])
def test_what_is_equal_has_no_distance(a: float, b: float) -> None:
    for statistic in ("mean", "std"):
        assert z(np.array([[a]]), np.array([[b]]), statistic=statistic) == [0]


@pytest.mark.parametrize(("a", "b"), [(math.nan, 1.0), (math.inf, 1.0), (math.inf, -math.inf), (1.0, math.nan)])
def test_a_number_is_infinitely_far_from_what_is_none(a: float, b: float) -> None:
    for seeds in (False, True):
        assert z(np.array([[a, a]]), np.array([[b, b]]), seeds).min() == math.inf


def test_a_lone_network_is_compared_by_rounding() -> None:
    one = np.array([[1.0]])
    half = math.sqrt(2.0**-23)
    assert z(one, one * (1 + 0.9 * half)) < 4 < z(one, one * (1 + 1.1 * half))
    assert z(one, one * (1 + 0.9 * half), statistic="std") < 4 < z(one, one * (1 + 1.1 * half), statistic="std")


def test_rounding_is_no_difference_where_seeds_agree() -> None:
    same = np.full((1, 8), 0.5)
    assert 0 < z(same, same * (1 + 1e-7)).max() < 4 < z(same, same * 1.01).max()


# --- run folders ------------------------------------------------------------------------------------------------------

Made = Callable[..., Path]


def stack(gain: float, seeds: range, depth: int, width: int = 100) -> pd.DataFrame:
    """std of a stack whose log does a random walk, as that of a real one does."""
    rows = []
    for seed in seeds:
        steps = np.random.default_rng(seed).normal(0, 1 / math.sqrt(width), depth) + math.log(gain)
        rows += [(seed, k + 1, math.exp(total)) for k, total in enumerate(np.cumsum(steps))]
    return pd.DataFrame(rows, columns=["seed", "layer", "std"]).assign(step=0, n_nan=0)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    def make(name: str, frame: pd.DataFrame, losses: pd.DataFrame | None = None, **columns: object) -> Path:
        told = {"task": "stack", "init": "kaiming", "gain": 1.0, "dtype": "float32", **columns}
        folder = tmp_path / name
        with Recorder(folder, told, "cpu", seeds=sorted({int(seed) for seed in frame["seed"]})) as recorder:
            recorder.add({"stats": frame} | ({} if losses is None else {"losses": losses}))
        return folder

    return make


def test_a_run_is_identical_to_its_repetition_and_not_to_another_gain(made: Made) -> None:
    a, again = made("a", stack(1, range(8), 20)), made("again", stack(1, range(8), 20))
    found = compare([str(a)], [str(again)])
    assert found.identical and found.equal and "configuration: the same" in str(found)
    other = compare([str(a)], [str(made("b", stack(2, range(8), 20), gain=2.0))])
    assert not other.equal and not other.identical
    assert "gain: 1 | 2" in str(other) and "first layer beyond 4: 1, std:" in str(other)


def test_the_first_layer_is_that_where_the_difference_begins(made: Made) -> None:
    frame = stack(1, range(8), 20)
    late = frame.assign(std=frame["std"] * np.where(frame["layer"] >= 13, 20.0, 1.0))
    found = str(compare([str(made("a", frame))], [str(made("b", late))]))
    assert "first layer beyond 4: 13, std:" in found and "64 of them differ" in found


def test_other_seeds_of_the_same_setting_are_equal_and_not_identical(made: Made) -> None:
    found = compare([str(made("a", stack(1, range(8), 20)))], [str(made("b", stack(1, range(8, 16), 20)))])
    assert found.equal and not found.identical and "20 means over other seeds" in str(found)
    far = compare([str(made("c", stack(1, range(8), 20)))], [str(made("d", stack(2, range(8, 16), 20)))])
    assert not far.equal


def test_rounding_in_one_step_is_told_from_a_difference(made: Made) -> None:
    frame = stack(1, range(1), 5)
    near, far = frame.assign(std=frame["std"] * (1 + 1e-6)), frame.assign(std=frame["std"] * 1.01)
    a = made("a", frame)
    found = compare([str(a)], [str(made("near", near))])
    assert found.equal and not found.identical
    found = compare([str(a)], [str(made("far", far))])
    assert not found.equal and "0.0099 relative" in str(found)


def test_sweeps_are_joined_setting_by_setting(made: Made) -> None:
    """The order of the jobs, and the gain that follows from the rule, tell nothing apart."""
    for k, (init, gain) in enumerate((("naive", 3.0), ("kaiming", 1.0))):
        made(f"a/{k}", stack(gain, range(4), 10), init=init, gain=gain)
        made(f"b/{1 - k}", stack(gain, range(4), 10), init=init, gain=gain)
        made(f"c/{k}", stack(gain * 2, range(4), 10), init=init, gain=gain * 2)
    a = str(made("a/0", stack(3, range(4), 10), init="naive", gain=3.0).parent)
    assert compare([a], [a.replace("/a", "/b")]).identical
    found = compare([a], [a.replace("/a", "/c")])
    assert not found.equal and "80 rows of the same networks" in str(found) and "gain: 3, 1 | 6, 2" in str(found)


def test_rows_of_one_side_are_counted_and_named(made: Made) -> None:
    deep, short = made("deep", stack(1, range(4), 10), depth=10), made("short", stack(1, range(4), 6), depth=6)
    found = compare([str(deep)], [str(short)])
    assert not found.equal
    assert "only in A: 16 rows (layer 7, 8, 9, 10)" in str(found) and "depth: 10 | 6" in str(found)
    more = compare([str(made("more", stack(1, range(6), 10), depth=10))], [str(deep)])
    assert more.equal and not more.identical and "2 seeds on one side alone" in str(more)


def test_tables_that_both_have_are_compared_and_others_are_named(made: Made) -> None:
    frame = stack(1, range(2), 3)
    losses = pd.DataFrame(
        {"seed": [0, 0, 1, 1], "step": [0, 1, 0, 1], "implementation": "scratch", "loss": [2.0, 1, 2.1, 1.1]}
    )
    a, same = made("a", frame, losses), made("same", frame, losses)
    assert compare([str(a)], [str(same)]).identical
    nan = compare([str(a)], [str(made("nan", frame, losses.assign(loss=[2.0, 1, 2.1, math.nan])))])
    assert not nan.equal and "loss: 1.1 | nan, nan or inf against a number" in str(nan)
    without = compare([str(a)], [str(made("without", frame))])
    assert not without.equal and "losses: only in A" in str(without)


def test_a_network_that_is_there_twice_is_said(made: Made) -> None:
    frame = stack(1, range(2), 3)
    for name in ("a/0", "a/1", "b/0"):
        folder = made(name, frame)
    found = compare([str(folder.parents[1] / "a")], [str(folder.parent)])
    assert found.equal and "A has some networks more than once" in str(found)


def test_a_side_is_a_folder_or_a_list_of_them(made: Made) -> None:
    a = made("a", stack(1, range(8), 20))
    assert compare(str(a), a).identical and compare([a], (str(a),)).identical
    for bad in (3, None, [3], "", [""]):
        with pytest.raises(UsageError, match="must be a folder or a glob"):
            compare(str(a), bad)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="must be a folder or a glob"):
            initlab.read(bad)  # type: ignore[arg-type]
