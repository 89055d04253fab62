import math

import numpy as np
import pandas as pd
import pytest
import torch

from initlab.errors import UsageError
from initlab.nn.init import GENERATORS, RULES, rule
from initlab.stats.dtypes import DTYPES
from initlab.stats.kernels.cpu import library
from initlab.stats.statistics import COUNTS, STATISTICS
from initlab.tasks import stack as stacking
from initlab.tasks.ensemble import plan as planning
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.memory import peak_bytes
from initlab.tasks.ensemble.networks import Ensemble, Net, Networks
from initlab.tasks.ensemble.plan import Plan, plan
from initlab.tasks.stack import stack
from tests.stats.exact import SINGLE

NUMBERS = list(STATISTICS)


def forward(frame: pd.DataFrame, tensor: str = "activation") -> pd.DataFrame:
    return frame[(frame["tensor"] == tensor) & (frame["direction"] == "forward")]


def first(frame: pd.DataFrame, dead: pd.Series) -> list[float]:
    return frame[dead].groupby("seed")["layer"].min().tolist()


def nonfinite(frame: pd.DataFrame) -> pd.Series:
    return frame["n_nan"] + frame["n_inf"] > 0


def test_naive_linear_overflows_where_the_format_ends_and_not_where_its_squares_do() -> None:
    """float32's own rms is inf from layer 18 on; the signal is finite up to layer 37 and all nan from 40 on."""
    signal = forward(stack("naive", "linear"))
    assert set(first(signal, nonfinite(signal))) <= {37, 38, 39}
    alive = signal[(signal["layer"] > 0) & (signal["layer"] <= 36)]
    growth = alive.pivot(index="layer", columns="seed", values="rms").apply(np.log10).diff().dropna()
    assert float(growth.to_numpy().mean()) == pytest.approx(1, abs=5 * 0.0036)  # sd of a step: 0.06, 280 steps
    dead = signal[signal["layer"] >= 42]
    assert (dead["n_nan"] == dead["count"]).all() and dead["std"].isna().all()


def test_small_linear_ends_at_exactly_zero() -> None:
    signal = forward(stack("small", "linear"))
    assert set(first(signal, signal["frac_zero"] == 1)) <= {45, 46, 47}
    assert (signal[signal["layer"] == 50]["rms"] == 0).all()
    at_30 = signal[signal["layer"] == 30]["rms"]  # a float32 square of 1e-30 reads 0; the signal lives
    assert at_30.between(1e-31, 1e-29).all()
    assert (signal["n_subnormal"] > 0).any()


@pytest.mark.parametrize(("init", "activation", "layers"), [("naive", "relu", (44, 47)), ("small", "relu", (39, 41))])
def test_relu_stacks_die_later_and_earlier(init: str, activation: str, layers: tuple[int, int]) -> None:
    signal = forward(stack(init, activation))
    found = first(signal, nonfinite(signal) if init == "naive" else signal["frac_zero"] == 1)
    assert len(found) == 8 and layers[0] <= min(found) and max(found) <= layers[1]


def test_lecun_holds_a_linear_stack_and_starves_a_relu_one() -> None:
    """ln std of a linear stack fluctuates by about 0.25 here, of the ReLU one by 0.7: five standard errors of 8."""
    linear, relu = (forward(stack("lecun", name)) for name in ("linear", "relu"))
    last = np.log(linear[linear["layer"] == 50]["std"])
    assert abs(float(last.mean())) < 5 * 0.3 / math.sqrt(8)
    rms = relu[relu["layer"] > 0].pivot(index="layer", columns="seed", values="rms")
    per_layer = (np.log(rms.loc[50]) - np.log(rms.loc[1])) / 49
    assert float(per_layer.mean()) == pytest.approx(-math.log(2) / 2, abs=5 * 0.9 / 49 / math.sqrt(8))
    assert relu[relu["layer"] == 50]["std"].between(1e-10, 1e-6).all()


def test_kaiming_keeps_its_second_moment_within_the_finite_width_spread() -> None:
    """Median std at layer 50 is 0.48 and ln std has sd 0.73 (100 units, batch of 200): five standard errors of 64."""
    signal = forward(stack("kaiming", "relu", seeds=range(64)))
    last = np.log(signal[signal["layer"] == 50]["std"])
    error_of_median = 1.2533 * 0.73 / math.sqrt(64)
    assert abs(float(last.median()) - math.log(0.48)) < 5 * error_of_median
    inside = last.between(math.log(0.23), math.log(1.0)).mean()
    assert abs(inside - 0.68) < 5 * math.sqrt(0.68 * 0.32 / 64)
    assert last.std() > 0.3  # it does spread: one network proves nothing


def test_kaiming_keeps_gradients_too_and_lecun_does_not() -> None:
    for init, expected in (("kaiming", 0.0), ("lecun", -49 * math.log(2) / 2)):
        frame = stack(init, "relu", seeds=range(16))
        pulled = frame[(frame["tensor"] == "activation") & (frame["direction"] == "backward") & (frame["layer"] == 1)]
        # sd of ln rms over networks below 1.1
        assert abs(float(np.log(pulled["rms"]).median()) - expected) < 5 * 1.2533 * 1.1 / 4 + 0.6


@pytest.mark.parametrize("init", RULES)
def test_a_member_equals_the_single_run(init: str) -> None:
    """Bit for bit at 100 x 100, as the kernels do on a CPU."""
    together = stack(init, depth=6, seeds=range(2, 6))
    alone = stack(init, depth=6, seeds=[4])
    mine = together[together["seed"] == 4].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, alone, check_exact=True)


def test_the_same_seed_gives_the_same_table() -> None:
    pd.testing.assert_frame_equal(stack(depth=5, seeds=[1]), stack(depth=5, seeds=[1]), check_exact=True)
    other = stack(depth=5, seeds=[2])
    assert not other[NUMBERS].equals(stack(depth=5, seeds=[1])[NUMBERS])


def test_a_deeper_stack_has_the_same_first_layers() -> None:
    shallow, deep = (forward(stack(depth=depth, seeds=[0, 1])) for depth in (4, 9))
    pd.testing.assert_frame_equal(
        shallow.reset_index(drop=True), deep[deep["layer"] <= 4].reset_index(drop=True), check_exact=True
    )


def test_more_networks_than_a_group_holds() -> None:
    frame = stack(depth=2, seeds=range(19))
    assert sorted(frame["seed"].unique()) == list(range(19))
    alone = stack(depth=2, seeds=[17])
    pd.testing.assert_frame_equal(frame[frame["seed"] == 17].reset_index(drop=True), alone, check_exact=True)


def test_rows_are_all_there() -> None:
    frame = stack(depth=3, seeds=[0])
    assert len(frame) == 1 + 3 * 4
    assert (
        set(frame["stage"]) == {"stack"} and set(frame["implementation"]) == {"scratch"} and set(frame["step"]) == {0}
    )
    layer_0 = frame[frame["layer"] == 0]
    assert layer_0[["tensor", "direction"]].to_numpy().tolist() == [["activation", "forward"]]
    top = frame[(frame["layer"] == 3) & (frame["tensor"] == "activation") & (frame["direction"] == "backward")]
    assert float(top["rms"].iloc[0]) == pytest.approx(1, abs=5 / math.sqrt(2 * 200 * 100))  # unit Gaussian gradient
    assert all(frame[name].dtype == np.int64 for name in COUNTS if name in frame)


def test_relu_halves_the_second_moment_of_a_symmetric_preactivation() -> None:
    frame = stack("lecun", "relu", depth=1, width=200, batch=500, seeds=range(8))
    z, a = (forward(frame, tensor)["q"].to_numpy() for tensor in ("preactivation", "activation"))
    layer_1 = a[8:]  # the first eight rows are the inputs
    assert np.mean(layer_1 / z) == pytest.approx(0.5, abs=5 * 0.005)
    zeros = forward(frame)[forward(frame)["layer"] == 1]["frac_zero"]
    assert float(zeros.mean()) == pytest.approx(0.5, abs=5 * 0.006)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_format_runs_and_says_where_it_ends(dtype: str) -> None:
    signal = forward(stack("naive", "linear", depth=50, seeds=[0], dtype=dtype, batch=50))
    expected = {"float16": (4, 6), "bfloat16": (36, 40), "float32": (36, 40), "float64": None}[dtype]
    found = first(signal, nonfinite(signal))
    if expected is None:
        assert not found
    else:
        assert expected[0] <= found[0] <= expected[1]


def test_torch_default_goes_blind_though_its_pooled_std_lives_on() -> None:
    signal = forward(stack("torch_default", "relu", seeds=range(4)))
    last = signal[signal["layer"] == 50]
    assert last["std"].between(0.02, 0.06).all()
    assert (signal[signal["layer"] == 12]["std_within"] < 1e-4).all()
    assert (last["cosine"] > 0.9999).all()


def test_scaling_the_weights_scales_every_layer() -> None:
    """A law of homogeneous stacks: gain k times, layer l's activations k^l times; exact for powers of two."""
    base, twice = (forward(stack(rule("kaiming", gain=gain), depth=8, seeds=[0])) for gain in (1.0, 2.0))
    ratio = twice["rms"].to_numpy() / base["rms"].to_numpy()
    np.testing.assert_allclose(ratio, 2.0 ** base["layer"].to_numpy(), rtol=1e-12)


def same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    """To the bit by the compiled passes; what runs together changes the roundings of plain PyTorch's float32 sums."""
    a, b = a.reset_index(drop=True), b.reset_index(drop=True)
    if library():
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    else:
        pd.testing.assert_frame_equal(a, b, rtol=SINGLE, atol=SINGLE)


def by_network(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values("seed", kind="stable")


def test_networks_may_differ_in_rule_and_gain_inside_one_call() -> None:
    """Also where one seed stands behind several rules, whose Gaussian numbers are then drawn once."""
    rules = ["naive", "kaiming", rule("lecun", gain=0.7), "kaiming", "small"]
    frame = stack(rules, depth=6, seeds=[3, 3, 3, 4, 4])
    first = frame[frame["layer"] == 0]
    assert first["init"].tolist() == ["naive", "kaiming", "normal, fan_in", "kaiming", "small"]
    np.testing.assert_allclose(first["gain"], [1, math.sqrt(2), 0.7, math.sqrt(2), 0.01], rtol=1e-15)
    assert len(frame) == 5 * (1 + 4 * 6)
    for k, (one, seed) in enumerate(zip(rules, [3, 3, 3, 4, 4], strict=True)):
        mine = frame.iloc[k::5].drop(columns=["init", "gain"])
        same(mine, stack(one, depth=6, seeds=[seed]))


def test_rules_of_different_distributions_and_biases_inside_one_call() -> None:
    rules = ["orthogonal", "torch_default", "kaiming", rule("kaiming", distribution="uniform")]
    frame = stack(rules, "tanh", depth=3, width=20, seeds=range(4))
    for k, one in enumerate(rules):
        same(frame.iloc[k::4].drop(columns=["init", "gain"]), stack(one, "tanh", depth=3, width=20, seeds=[k]))


def test_many_networks_with_rules_of_their_own_stay_one_table() -> None:
    rules = ["naive"] * 10 + ["small"] * 9
    frame = stack(rules, depth=2, width=10, seeds=range(19))
    assert frame["init"].dtype == "category"
    assert (frame["init"] == np.where(frame["seed"] < 10, "naive", "small")).all()


@pytest.mark.parametrize("init", ["kaiming", "naive"])
def test_without_the_backward_pass_the_forward_rows_are_the_same(init: str) -> None:
    whole, half = stack(init, seeds=range(3)), stack(init, seeds=range(3), backward=False)
    same(half, whole[whole["direction"] == "forward"].astype({"direction": half["direction"].dtype}))


def test_rows_are_handed_over_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacking, "FLUSH_ROWS", 100)
    parts: list[pd.DataFrame] = []
    returned = stack(depth=160, width=20, seeds=range(3), emit=lambda frames: parts.append(frames["stats"]))
    assert len(returned) == 0 and len(parts) > 3
    whole = stack(depth=160, width=20, seeds=range(3))
    for name in whole:
        np.testing.assert_array_equal(np.concatenate([part[name].to_numpy() for part in parts]), whole[name].to_numpy())


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_rows_outlive_an_interruption(fault: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise fault

    monkeypatch.setattr(stacking._Buffers, "activate_back", fails)
    parts: list[pd.DataFrame] = []
    with pytest.raises(fault):
        stack(depth=5, width=10, seeds=[0], emit=lambda frames: parts.append(frames["stats"]))
    assert len(pd.concat(parts)) == 1 + 2 * 5


def test_memory_of_a_forward_pass_does_not_grow_with_depth() -> None:
    def peak(depth: int, backward: bool) -> float:
        place = torch.device("cpu")
        return peak_bytes(
            lambda: stack("naive", depth=depth, seeds=[0], backward=backward, emit=lambda frames: None), place
        )

    short, long = peak(150, False), peak(200, False)  # dead in both: who follows it takes some memory too
    assert long - short < 2**18
    assert peak(150, True) - short > 100 * 100 * 200 * 4  # the preactivations


def test_short_memory_draws_twice_then_runs_fewer_then_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net.resolve("relu", 50, 100, None, 200)
    usual = stack(depth=50, seeds=range(3))

    def planned(free: float) -> Plan:
        monkeypatch.setattr(planning, "free_memory", lambda device: free)
        return plan(net, 3, Where())

    preactivations = 50 * 200 * 100 * 4
    assert planned(math.inf) == Plan(3, True, 3 * (preactivations + 50 * 100 * 100 * 4))
    assert planned(45e6) == Plan(3, False, 3 * preactivations)
    same(stack(depth=50, seeds=range(3)), usual)
    assert planned(30e6) == Plan(2, False, 2 * preactivations)
    same(by_network(stack(depth=50, seeds=range(3))), by_network(usual))
    with pytest.raises(UsageError, match=r"5 MB are free and one network keeps 4 MB .* use backward=false"):
        planned(5e6)
    assert plan(net, 3, Where(), backward=False).kept == 0
    with pytest.raises(UsageError, match=r"works on .* use less width or batch"):
        plan(Net.resolve("relu", 50, 1000, None, 200), 3, Where(), backward=False)


def test_networks_are_halved_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, tried = stack(depth=3, seeds=range(8)), []
    run = stacking._Pass.run

    def short(self: stacking._Pass) -> None:
        tried.append(len(self.nets))
        if len(self.nets) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(self)

    monkeypatch.setattr(stacking._Pass, "run", short)
    most = 3
    same(by_network(stack(depth=3, seeds=range(8))), by_network(usual))
    assert tried == [8, 4, 2, 2, 4, 2, 2]
    most = 0
    with pytest.raises(UsageError, match="not enough memory for one network"):
        stack(depth=3, seeds=range(8))


def test_mistakes_are_one_line() -> None:
    cases: list[tuple[dict[str, object], str]] = [
        ({"depth": 0}, "depth=0"),
        ({"width": 0}, "width"),
        ({"activation": "rel"}, "relu"),
        ({"dtype": "f32"}, "float32"),
        ({"init": "he"}, "init=he"),
        ({"device": "gpu"}, "auto"),
        ({"init": ["kaiming", "naive"], "seeds": [0, 1, 2]}, "init: 2 for 3 networks"),
        ({"init": ["kaiming", "he"], "seeds": [0, 1]}, "init=he"),
        ({"seeds": []}, "seeds=0"),
    ]
    for bad, text in cases:
        with pytest.raises(UsageError, match=text):
            stack(**bad)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_gpu_sees_the_same_networks() -> None:
    cpu, gpu = (forward(stack(depth=10, seeds=range(4), device=device)) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(gpu["rms"], cpu["rms"], rtol=1e-5)  # ten layers of float32 rounding


@pytest.mark.slow
def test_kaiming_spread_over_a_thousand_networks() -> None:
    signal = forward(stack("kaiming", "relu", seeds=range(1000)))
    last = np.log(signal[signal["layer"] == 50]["std"])
    assert abs(float(last.median()) - math.log(0.48)) < 5 * 1.2533 * 0.73 / math.sqrt(1000)
    assert abs(last.between(math.log(0.23), math.log(1.0)).mean() - 0.68) < 5 * math.sqrt(0.68 * 0.32 / 1000) + 0.01


@pytest.mark.parametrize("generator", GENERATORS)
def test_whoever_draws_a_network_of_an_ensemble_is_the_single_network(generator: str) -> None:
    together = stack(depth=5, width=20, batch=30, seeds=[3, 0, 8], generator=generator)
    for seed in (0, 8):
        alone = stack(depth=5, width=20, batch=30, seeds=[seed], generator=generator)
        mine = together[together["seed"] == seed].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine[NUMBERS], alone[NUMBERS], rtol=1e-12)


def test_layers_of_any_widths_are_those_drawn_alone() -> None:
    """However many are drawn ahead, upwards, and downwards where weights are drawn a second time."""
    net = Net.resolve("relu", 50, 100, None, 4, False, [9, 9, 7, 9, 9, 9, 2, 2])
    for rules in (["kaiming"] * 2, ["kaiming", "xavier"]):
        drawn = Networks(net, Ensemble.resolve(rules, [3, 5], net.activation), Where())
        for layer in (*range(1, 9), *range(8, 0, -1)):
            alone, _ = drawn.weights(layer, [0, 1])
            assert torch.equal(drawn.weights(layer)[0], alone)


def test_the_generator_draws_weights_and_inputs() -> None:
    by_torch, by_philox = (
        forward(stack(depth=1, seeds=[0], generator=name), "activation")["rms"].tolist() for name in GENERATORS
    )
    for layer in (0, 1):
        assert by_torch[layer] != by_philox[layer]
        assert by_torch[layer] == pytest.approx(by_philox[layer], rel=0.3)  # one law
    with pytest.raises(UsageError, match="generator=mersenne: must be one of philox, torch"):
        stack(generator="mersenne")


def test_threads_take_chunks_and_change_nothing() -> None:
    """Every network is computed by one thread, so that two threads give the very table that one gives."""
    one = stack(depth=6, width=20, seeds=range(5))
    torch.set_num_threads(2)
    two = stack(depth=6, width=20, seeds=range(5))
    streamed: list[pd.DataFrame] = []
    stack(depth=6, width=20, seeds=range(5), emit=lambda frames: streamed.append(frames["stats"]))
    assert torch.get_num_threads() == 2
    keys = ["seed", "direction", "layer", "tensor"]
    both = [frame.sort_values(keys, ignore_index=True) for frame in (one, two, pd.concat(streamed))]
    pd.testing.assert_frame_equal(both[0], both[1], check_exact=True, check_categorical=False)
    pd.testing.assert_frame_equal(both[0], both[2], check_exact=True, check_categorical=False)


def test_a_fault_in_one_chunk_ends_all() -> None:
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        stack(depth=3, width=8, seeds=range(6), emit=lambda frames: 1 / 0)
    assert torch.get_num_threads() == 2
