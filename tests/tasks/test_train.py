import math
from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from initlab.engine import mlp
from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import RULES, rule
from initlab.nn.loss_table import LOSSES
from initlab.tasks import train as train_module
from initlab.tasks.data import Data, load
from initlab.tasks.ensemble.batches import batches
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.networks import Frames, draw_trained
from initlab.tasks.ensemble.training import MODULES, OPTIMIZERS, Training
from initlab.tasks.train import train
from initlab.tasks.twins import TwinTraining
from tests.conftest import ROWS
from tests.long import long_except

DIGITS = load("digits")
LIMIT = {"float32": 1e-5, "float64": 1e-12}


def gradients(frames: Frames) -> pd.DataFrame:
    parity = frames["parity"]
    return parity[parity["direction"] == "backward"]


PAIRS = [("kaiming", name) for name in ROWS] + [(name, phi) for name in RULES for phi in ("relu", "selu")]


@pytest.mark.parametrize("dtype", long_except(LIMIT, next(iter(LIMIT))))
@pytest.mark.parametrize(("init", "activation"), long_except(dict.fromkeys(PAIRS), *PAIRS[::3]))
def test_by_hand_equals_the_module_for_every_rule_and_activation(init: str, activation: str, dtype: str) -> None:
    """Gradients of weights, biases, preactivations and activations, from equal parameters, at the default shape."""
    frames = train(DIGITS, init, activation, steps=8, seeds=range(2), dtype=dtype)
    found = gradients(frames)
    assert len(found) == 8 * 2 * (2 + 1 + 2 + 2)
    assert (found["n_nonfinite"] == 0).all()
    assert found["relative_error"].max() <= LIMIT[dtype]
    assert (frames["stats"]["direction"] == "backward").any()


@pytest.mark.parametrize(("init", "activation"), [("kaiming", "relu"), ("kaiming", "tanh"), ("orthogonal", "linear")])
def test_by_hand_equals_the_module_at_depth_50(init: str, activation: str) -> None:
    """Where gradients are normal numbers and the net is not chaotic; in float32 a ReLU mask may flip later on."""
    frames = train(DIGITS, init, activation, depth=50, width=100, steps=2, lr=0.001, seeds=[0, 1], dtype="float64")
    assert gradients(frames)["relative_error"].max() <= LIMIT["float64"]
    frames = train(DIGITS, init, activation, depth=50, width=100, steps=1, seeds=[0, 1])
    assert gradients(frames)["relative_error"].max() <= LIMIT["float32"]


def test_a_wrong_gradient_shows_in_the_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    """The opposite claim: a hand-written gradient that is off by 0.1 % is seen at once."""
    right = mlp.lin_param_grads
    monkeypatch.setattr(mlp, "lin_param_grads", lambda g, inp: (right(g, inp)[0] * 1.001, right(g, inp)[1]))
    found = gradients(train(DIGITS, steps=2, seeds=[0]))
    assert found[found["tensor"] == "weight"]["relative_error"].to_numpy() == pytest.approx(1e-3, rel=0.01)
    assert found[found["tensor"] == "bias"]["relative_error"].max() <= LIMIT["float32"]


def test_the_two_trainings_stay_together() -> None:
    losses = train(DIGITS, steps=101)["losses"]
    wide = losses.pivot(index=["seed", "step"], columns="implementation", values="loss")
    apart = (wide["scratch"] - wide["module"]).abs() / wide["module"]
    assert apart.max() <= 1e-4
    start, end = wide.loc[(slice(None), 0), :].mean(), wide.loc[(slice(None), 100), :].mean()
    assert (end < start / 4).all()  # and they learn: standing still together would prove nothing


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_moves_both_alike(optimizer: str) -> None:
    frames = train(DIGITS, steps=4, lr=0.01, optimizer=optimizer, seeds=[0, 1], dtype="float64")
    weights = frames["parity"][(frames["parity"]["tensor"] == "weight") & (frames["parity"]["direction"] == "forward")]
    assert weights["relative_error"].max() <= 1e-9
    updates = frames["stats"][frames["stats"]["tensor"] == "update"]
    assert (updates["rms"] > 0).all()


THEIRS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_named_optimizer_is_torchs_own_to_the_last_bit(name: str) -> None:
    """Steps, states and hooks, with rates by group; from a state that torch's own has saved, too."""
    kind, arguments = THEIRS[name]
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(3, 2, generator=generator), torch.randn(2, generator=generator)]
    ours, theirs = ([one.clone().requires_grad_() for one in start] for _ in range(2))
    by_us = OPTIMIZERS[name]([{"params": ours[:1], "lr": 0.3}, {"params": ours[1:]}], lr=0.1)
    by_torch = kind([{"params": theirs[:1], "lr": 0.3}, {"params": theirs[1:]}], lr=0.1, **arguments)
    steps = []
    by_us.register_step_post_hook(lambda *_: steps.append(1))
    for step in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        by_us.step()
        by_torch.step()
        assert all(map(torch.equal, ours, theirs))
        if step == 2:
            by_us.load_state_dict(deepcopy(by_torch.state_dict()))
    assert len(steps) == 5 and not any(map(torch.equal, ours, start))
    assert isinstance(by_us, kind) and all(p.requires_grad and p.is_leaf for p in ours)
    by_us.zero_grad()
    assert [p.grad for p in ours] == [None, None]


def test_an_update_is_the_change_of_the_weights() -> None:
    """Plain SGD: update = -lr times the gradient, so its rms is lr times the gradient's."""
    stats = train(DIGITS, steps=3, lr=0.05, seeds=[0, 1], dtype="float64")["stats"]
    keys = ["implementation", "seed", "step", "layer"]
    update = stats[stats["tensor"] == "update"].set_index(keys)["rms"]
    gradient = stats[(stats["tensor"] == "weight") & (stats["direction"] == "backward")].set_index(keys)["rms"]
    pd.testing.assert_series_equal(update, 0.05 * gradient, rtol=1e-9, check_names=False)


def test_what_is_recorded() -> None:
    stats = train(DIGITS, depth=2, steps=1, seeds=[0])["stats"]
    for implementation in ("scratch", "module"):
        mine = stats[stats["implementation"] == implementation]
        layers = {
            (tensor, direction): sorted(rows["layer"])
            for (tensor, direction), rows in mine.groupby(["tensor", "direction"], observed=True)
        }
        both = {
            (tensor, d): [1, 2, 3] for tensor in ("preactivation", "weight", "bias") for d in ("forward", "backward")
        }
        hidden = {("activation", d): [1, 2] for d in ("forward", "backward")}
        assert layers == both | hidden | {("update", "forward"): [1, 2, 3]}
    first = stats[(stats["tensor"] == "weight") & (stats["direction"] == "forward") & (stats["layer"] == 1)]
    assert first["std"].to_numpy() == pytest.approx(math.sqrt(2 / 64), rel=5 / math.sqrt(2 * 64 * 50))


def test_a_member_equals_the_single_run() -> None:
    """Equal inputs give equal networks to 4 eps a layer, so the first losses agree so far; later steps carry it on."""
    together, alone = train(DIGITS, steps=5, seeds=range(3, 6)), train(DIGITS, steps=5, seeds=[4])
    a, b = (frames["losses"].query("seed == 4").sort_values(["implementation", "step"])["loss"].to_numpy()
            for frames in (together, alone))  # fmt: skip
    np.testing.assert_allclose(a, b, rtol=1e-6)
    stats = [frames["stats"].query("seed == 4 and step == 0 and layer == 1").reset_index(drop=True)
             for frames in (together, alone)]  # fmt: skip
    np.testing.assert_allclose(stats[0]["rms"], stats[1]["rms"], rtol=1e-6)


def test_the_same_seed_gives_the_same_tables() -> None:
    one, two = train(DIGITS, steps=3, seeds=[0, 1]), train(DIGITS, steps=3, seeds=[0, 1])
    for name in one:
        pd.testing.assert_frame_equal(one[name], two[name], check_exact=True)


def test_recording_changes_nothing_but_rounding() -> None:
    """A step that is not recorded adds the gradient to the weights at once, which rounds once instead of twice."""
    keys = ["implementation", "seed", "step", "layer", "tensor", "direction"]
    often, seldom = (train(DIGITS, steps=7, every=every, seeds=[0, 1]) for every in (1, 3))
    torch.testing.assert_close(
        torch.tensor(often["losses"]["loss"]), torch.tensor(seldom["losses"]["loss"]), rtol=1e-5, atol=0
    )
    assert sorted(seldom["stats"]["step"].unique()) == [0, 3, 6]
    both = (frame["stats"].set_index(keys).sort_index() for frame in (often, seldom))
    kept, few = (frame.loc[frame.index.get_level_values("step").isin([0, 3, 6])] for frame in both)
    pd.testing.assert_index_equal(kept.index, few.index)
    rms = torch.from_numpy(few["rms"].to_numpy(copy=True))
    for name in ("mean", "std", "rms"):
        ours, theirs = (torch.from_numpy(frame[name].to_numpy(copy=True)) for frame in (kept, few))
        assert ((ours - theirs).abs() <= 1e-4 * rms).all()


def test_networks_see_their_own_batches_in_their_own_order() -> None:
    """Two seeds from equal weights would differ; one epoch shows every row once."""
    x = torch.arange(12.0).unsqueeze(1)
    data = Data("count", x, torch.zeros(12), None)
    seen = list(batches(data, Training(batch=4, steps=6, loss="mse"), [0, 1], Where()))
    for member in (0, 1):
        for epoch in (0, 1):
            rows = torch.cat([xb[member] for xb, _ in seen[3 * epoch : 3 * epoch + 3]])
            assert sorted(rows.flatten().tolist()) == list(range(12))
    assert not torch.equal(seen[0][0][0], seen[0][0][1])
    assert not torch.equal(seen[0][0][0], seen[3][0][0])


def test_a_diverging_training_is_data() -> None:
    frames = train(DIGITS, "naive", depth=50, width=100, steps=2, seeds=[0, 1])
    assert not np.isfinite(frames["losses"]["loss"]).all()
    assert (frames["parity"]["n_nonfinite"] > 0).any()
    assert frames["parity"][frames["parity"]["n_nonfinite"] > 0]["relative_error"].isna().all()
    assert (frames["stats"]["n_nan"] + frames["stats"]["n_inf"] > 0).any()


@pytest.mark.parametrize("optimizer", long_except(OPTIMIZERS, "sgd", "adam"))
@pytest.mark.parametrize(("data", "loss"), [("digits", "cross_entropy"), ("digits", "mse"), ("teacher", "mse")])
def test_the_default_rate_trains(data: str, loss: str, optimizer: str) -> None:
    """No loss is lost, no layer dies, and the end is below the loss of a constant answer."""
    source = load(data)
    rows = Data(source.name, source.x[:1600], source.y[:1600], source.classes)
    found = train(rows, depth=1, width=50, steps=120, seeds=2, loss=loss, optimizer=optimizer, every=120)
    by_hand = found["losses"].query("implementation == 'scratch'")
    end = by_hand[by_hand["step"] >= 100].groupby("seed")["loss"].mean()
    assert (end < 0.95 * rows.constant_loss(loss)).all()
    units = found["stats"].query("tensor == 'activation' and layer == 1 and implementation == 'scratch'")
    assert units["frac_dead"].max() < 0.5


def test_what_a_constant_answer_costs() -> None:
    """The best constant: no other number, and no other shares of classes, have a lower loss."""
    y = torch.tensor([0, 0, 0, 1])
    data = Data("small", torch.zeros(4, 1), y, 2)
    assert data.constant_loss("mse") == pytest.approx(float(y.double().var(correction=0)))
    shares = [torch.tensor([p, 1 - p], dtype=torch.float64).log() for p in (0.74, 0.75, 0.76)]
    losses = [float(torch.nn.functional.nll_loss(one.expand(4, 2), y)) for one in shares]
    assert data.constant_loss("cross_entropy") == pytest.approx(losses[1]) and losses[1] == min(losses)


def test_regression_of_the_label_and_of_a_teacher() -> None:
    frames = train(DIGITS, loss="mse", lr=0.001, steps=60, seeds=[0, 1], dtype="float64")
    assert frames["losses"]["accuracy"].isna().all()
    by_step = frames["losses"].groupby("step")["loss"].mean()
    assert by_step[59] < by_step[0] / 2
    assert gradients(frames)["relative_error"].max() <= LIMIT["float64"]


def test_interrupted_and_flushed() -> None:
    """What was measured is handed over, also when the run is stopped in the middle of a step."""
    kept: list[Frames] = []

    class Stop(BaseException):
        pass

    original = train_module.TwinTraining.step

    def stopping(self: TwinTraining, step: int, *rest: Tensor, record: bool) -> None:
        if step == 3:
            raise Stop
        original(self, step, *rest, record=record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.TwinTraining, "step", stopping)
        with pytest.raises(Stop):
            train(DIGITS, steps=10, seeds=[0], emit=kept.append)
    assert sorted(pd.concat([part["losses"] for part in kept])["step"].unique()) == [0, 1, 2]


def test_half_precision_trains() -> None:
    for dtype in ("float16", "bfloat16"):
        losses = train(DIGITS, steps=30, seeds=[0], dtype=dtype)["losses"]
        assert losses["loss"].iloc[-1] < losses["loss"].iloc[0]


def test_mistakes_are_one_line() -> None:
    teacher = Data("teacher", torch.randn(20, 3), torch.randn(20), None)
    cases: list[tuple[Data, dict[str, object], str]] = [
        (DIGITS, {"loss": "mae"}, "^loss=mae"),
        (DIGITS, {"optimizer": "sdg"}, "did you mean sgd"),
        (DIGITS, {"batch": 1798}, "1797 training rows"),
        (DIGITS, {"steps": 0}, "^steps=0"),
        (DIGITS, {"lr": -0.1}, "^lr=-0.1"),
        (DIGITS, {"lr": math.nan}, "finite"),
        (teacher, {"loss": "cross_entropy", "batch": 5}, "no classes; use loss=mse"),
    ]
    for data, options, text in cases:
        with pytest.raises(UsageError, match=text):
            train(data, **options)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_gpu_trains_alike() -> None:
    frames = train(DIGITS, steps=20, seeds=[0, 1], device="cuda")
    assert gradients(frames)["relative_error"].median() <= LIMIT["float32"]
    cpu = train(DIGITS, steps=20, seeds=[0, 1])
    np.testing.assert_allclose(frames["losses"]["loss"], cpu["losses"]["loss"], rtol=1e-3)


@pytest.mark.slow
def test_parity_over_the_whole_default_run() -> None:
    for init in RULES:
        for activation in ACTIVATIONS:
            for dtype, limit in LIMIT.items():
                frames = train(DIGITS, init, activation, dtype=dtype)
                assert gradients(frames)["relative_error"].max() <= limit, (init, activation, dtype)


def test_modules_run_one_by_one_or_all_at_once() -> None:
    """The same training, batched or not: kernels of another order of adding differ by float32's rounding a step."""
    runs = [train(DIGITS, steps=6, every=4, seeds=[0, 1, 2], modules=modules)["losses"] for modules in MODULES]
    torch.testing.assert_close(*(torch.tensor(frame["loss"]) for frame in runs), rtol=1e-5, atol=0)
    with pytest.raises(UsageError, match="modules"):
        train(DIGITS, steps=1, seeds=[0], modules="all")


def test_histograms_are_kept_if_wanted() -> None:
    frames = train(DIGITS, steps=3, seeds=[0, 1], histograms=True)
    assert len(frames["histograms"]) == len(frames["stats"])
    assert set(frames["histograms"]["implementation"]) == {"scratch", "module"}
    assert "histograms" not in train(DIGITS, steps=1, seeds=[0])


def test_networks_may_differ_in_rule_and_learning_rate() -> None:
    """Each row says whose it is, and every network trains as it does alone: rounding of a batched product."""
    inits, rates, seeds = ["lecun", "kaiming", "kaiming"], [0.1, 0.1, 0.3], [0, 0, 5]
    together = train(DIGITS, inits, steps=4, lr=rates, seeds=seeds)
    for init, rate, seed in zip(inits, rates, seeds, strict=True):
        alone = train(DIGITS, init, steps=4, lr=rate, seeds=[seed])["losses"]
        found = together["losses"]
        own = found[(found["init"] == init) & (found["lr"] == rate) & (found["seed"] == seed)]
        torch.testing.assert_close(
            torch.tensor(own["loss"].to_numpy()), torch.tensor(alone["loss"].to_numpy()), rtol=1e-5, atol=0
        )
    assert set(together["stats"]["init"]) == {"lecun", "kaiming"} and "gain" in together["parity"]
    with pytest.raises(UsageError, match=r"^lr: 2 for 3 networks"):
        train(DIGITS, steps=1, lr=[0.1, 0.2], seeds=seeds)
    with pytest.raises(UsageError, match="needs sgd"):
        train(DIGITS, steps=1, lr=rates, seeds=[0, 1, 5], optimizer="adam")


def test_what_does_not_fit_into_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "free_memory", lambda device: 1e5)
    with pytest.raises(UsageError, match=r"^depth=1 width=50 batch=64: .* 100 kB are free"):
        train(DIGITS, steps=1, seeds=[0])
    monkeypatch.setattr(train_module, "free_memory", lambda device: 2e6)  # room for one at a time
    few = train(DIGITS, steps=2, seeds=[0, 1, 2])
    monkeypatch.undo()
    torch.testing.assert_close(
        *(
            torch.tensor(frames["losses"].sort_values(["implementation", "seed", "step"])["loss"].to_numpy())
            for frames in (few, train(DIGITS, steps=2, seeds=[0, 1, 2]))
        ),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_under_mup_both_trainings_move_every_layer_by_its_own_rate(optimizer: str) -> None:
    """At twice the base width; the factors show in the updates of both, by hand and by torch.optim alike."""
    rates = {"width": 100, "steps": 3, "lr": 0.01, "optimizer": optimizer, "seeds": [0, 1], "depth": 2}
    frames = train(DIGITS, "mup", dtype="float64", **rates)  # type: ignore[arg-type]
    weights = frames["parity"].query("direction == 'forward'")
    assert weights["relative_error"].max() < 1e-9 and weights["step"].max() == 2
    plain = train(DIGITS, rule("mup", base_width=100), dtype="float64", **rates)  # type: ignore[arg-type]
    keys = ["implementation", "seed", "layer"]
    first = "step == 0 and tensor == '{}' and direction == '{}'"
    gradients, updates = (first.format("weight", "backward"), first.format("update", "forward"))
    factors = []
    for found in (frames, plain):
        ratios = (
            found["stats"].query(updates).set_index(keys)["rms"]
            / found["stats"].query(gradients).set_index(keys)["rms"]
        )
        factors.append(found["stats"].query(updates).set_index(keys)["rms"] if optimizer == "adam" else ratios)
    expected = (1, 0.5, 0.5) if optimizer == "adam" else (2, 1, 0.5)
    for (_, _, layer), factor in (factors[0] / factors[1]).items():
        assert factor == pytest.approx(expected[layer - 1], rel=0.01)  # Adam's eps, and gradients that are 0


def test_networks_of_several_base_widths_need_sgd() -> None:
    inits, options = ["mup", "kaiming"], {"width": 100, "steps": 2, "seeds": [3, 3]}
    together = train(DIGITS, inits, **options)["losses"]  # type: ignore[arg-type]
    for init in inits:
        alone = train(DIGITS, init, width=100, steps=2, seeds=[3])["losses"]["loss"].to_numpy()
        assert together[together["init"] == init]["loss"].to_numpy() == pytest.approx(alone, rel=1e-5)
    with pytest.raises(UsageError, match="needs sgd"):
        train(DIGITS, inits, optimizer="adam", **options)  # type: ignore[arg-type]


def test_drift_is_how_far_the_first_batch_has_moved() -> None:
    """After one step of gradient descent, from the readable pass: z(W - lr g) - z(W) on the batch of step 0."""
    lr, seeds, sizes = 0.05, [3, 4], [64, 12, 10]
    stats = train(DIGITS, width=12, steps=2, lr=lr, seeds=seeds, dtype="float64", drift=True)["stats"]
    xb, yb = next(iter(batches(DIGITS, Training(steps=1), seeds, Where(torch.float64))))
    start = draw_trained([RULES["kaiming"]] * 2, "relu", sizes, seeds, xb).parameters
    seen = mlp.forward_and_backward(start, xb, yb, ACTIVATIONS["relu"], LOSSES["cross_entropy"])
    moved = [(w - lr * gw, b - lr * gb) for (w, b), (gw, gb) in zip(start, seen.parameter_grads, strict=True)]
    now = mlp.forward(moved, xb, ACTIVATIONS["relu"])[0]
    drift = stats[stats["tensor"] == "drift"].set_index(["step", "implementation", "layer", "seed"]).sort_index()
    for layer, (old, new) in enumerate(zip(seen.preactivations, now, strict=True), start=1):
        wanted = (new - old).square().mean((-2, -1)).sqrt().tolist()
        for name in ("scratch", "module"):  # rounding of differences of numbers a hundred times as large
            assert drift.loc[(1, name, layer)]["rms"].tolist() == pytest.approx(wanted, rel=1e-9)
    assert (drift.loc[0]["rms"] == 0).all()
    assert drift.loc[1]["cosine"].notna().all()  # it is a batch like the preactivations


def test_drift_is_recorded_on_request_and_changes_nothing() -> None:
    plain, with_drift = (train(DIGITS, steps=3, seeds=[0], every=2, drift=drift)["stats"] for drift in (False, True))
    assert "drift" not in set(plain["tensor"])
    keys = ["implementation", "seed", "step", "layer", "tensor", "direction"]
    words = dict.fromkeys(("implementation", "tensor", "direction"), str)  # categories sort in order of appearance
    rest = with_drift[with_drift["tensor"] != "drift"]
    both = [frame.astype(words).sort_values(keys)["rms"].to_numpy() for frame in (plain, rest)]
    np.testing.assert_array_equal(*both)
