"""What a verdict must not blame, what it must not miss, and what it says of bad input; nothing is ever moved."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import initlab
from benchmarks.faults import mlp

RELU = 2**0.5


def orthogonal(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Towers(nn.Module):
    """A policy and a value side by side; the policy's head is small by design."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.value = (
            nn.Sequential(orthogonal(8, 64, RELU), nn.Tanh(), orthogonal(64, 64, RELU), nn.Tanh(), orthogonal(64, n, g))
            for n, g in ((4, 0.01), (1, 1.0))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(x), self.value(x)


class Again(nn.Module):
    """One block that is called eight times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        nn.init.kaiming_normal_(self.block[0].weight)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(8):
            x = self.block(x)
        return x


class Gated(nn.Module):
    """A residual branch that starts at 0, with a gate behind it whose inputs are therefore 0."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16)
        nn.init.zeros_(self.norm.weight)
        self.fc1, self.fc2, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        nn.init.zeros_(self.fc1.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        h = self.norm(self.branch(x))
        return self.head(x + h * torch.sigmoid(self.fc2(torch.relu(self.fc1(h)))))


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))


def shallow() -> nn.Module:
    return nn.Sequential(*[part for _ in range(3) for part in (nn.Linear(64, 64), nn.Tanh())], nn.Linear(64, 3))


def idle_norms() -> nn.Module:
    parts = (part for _ in range(6) for part in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()))
    return nn.Sequential(*parts, nn.Linear(64, 10)).eval()


HEALTHY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "towers": (Towers, (16, 8)),
    "one block again": (Again, (32, 64)),
    "a branch of 0": (Gated, (32, 16)),
    "one unit": (tiny, (8, 1)),
    "torch's default, four layers": (shallow, (32, 64)),
    "norms in eval mode": (idle_norms, (32, 64)),
    "three-dimensional input": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), (4, 5, 8)),
    "one example": (lambda: mlp(5, 64, nn.ReLU, RELU), (1, 64)),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_no_fault_is_no_error(name: str) -> None:
    make, shape = HEALTHY[name]
    for seed in range(3):
        torch.manual_seed(seed)
        verdict = initlab.diagnose(make(), torch.randn(shape))
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize("k", [0, 8, 20])
@pytest.mark.parametrize("value", [1e3, -50.0])
def test_a_bias_that_outweighs_everything(k: int, value: float) -> None:
    torch.manual_seed(0)
    model = mlp(10, 64, nn.ReLU, RELU)
    with torch.no_grad():
        model[k].bias.fill_(value)  # type: ignore[union-attr]
    verdict = initlab.diagnose(model, torch.randn(32, 64))
    error = verdict.findings[0]
    assert verdict.ok == (k == 20)  # of outputs it may be meant
    assert error.factors == {f"{k}.bias": 0.0} and error.layer == k // 2 + 1, str(verdict)
    assert error.rule == ("bias-too-large" if value > 0 or k == 20 else "dead")
    with torch.no_grad():
        model[k].bias.zero_()  # type: ignore[union-attr]
    assert initlab.diagnose(model, torch.randn(32, 64)).ok


class Fused(nn.Module):
    """Attention with its three projections in one matrix."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(48) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(48, 144) for _ in range(4))
        self.proj = nn.ModuleList(nn.Linear(48, 48) for _ in range(4))
        with torch.no_grad():
            self.qkv[2].weight.mul_(factor)

    def forward(self, x: Tensor) -> Tensor:
        for norm, qkv, proj in zip(self.norms, self.qkv, self.proj, strict=True):
            q, k, v = qkv(norm(x)).chunk(3, -1)
            x = x + proj(nn.functional.scaled_dot_product_attention(q, k, v))
        return x


@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_a_stacked_weight_is_one_finding(factor: float) -> None:
    torch.manual_seed(0)
    verdict = initlab.diagnose(Fused(factor), torch.randn(4, 12, 48))
    (error,) = verdict.errors
    parts = {f"qkv.2.weight[{part}]" for part in ("query", "key", "value")}
    assert set(error.factors) == parts, str(verdict)
    assert all(0.5 < value * factor < 2 for value in error.factors.values())  # torch draws 0.58 of what is usual


class Argmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count, self.seen = nn.Linear(64, 4), 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(x)
        return self.layer(x).argmax(-1)


def test_nothing_trains_is_said() -> None:
    x = torch.randn(8, 64)
    frozen = mlp(3, 64, nn.ReLU, RELU).requires_grad_(False)
    assert [one.rule for one in initlab.diagnose(frozen, x).errors] == ["frozen"]
    model = Argmax()
    assert [one.rule for one in initlab.diagnose(model, x).errors] == ["no-gradient"]
    assert model.count == 0 and model.seen == []  # what the code keeps is put back
    assert [one.rule for one in initlab.diagnose(mlp(3, 64, nn.ReLU, RELU), 0 * x).errors] == ["input-scale"]
    unused = nn.ModuleDict({"used": nn.Linear(64, 4), "left": nn.Linear(4, 4)})
    unused.forward = lambda x: unused["used"](x)  # type: ignore[method-assign]
    assert "left" in str(initlab.diagnose(unused, x))


X = torch.randn(8, 64)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(3, 64, nn.ReLU, RELU)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x.requires_grad_(), use_reentrant=True)  # type: ignore[no-any-return]


BAD: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "no model": (lambda m: initlab.diagnose("net", X), r"model=str: must be an nn\.Module"),  # type: ignore[arg-type]
    "no batch": (lambda m: initlab.diagnose(m, None), "x is missing"),
    "wrong shape": (lambda m: initlab.diagnose(m, X[:, :5]), r"x=float32 \(8, 5\): does not fit 0 \(Linear\)"),
    "empty": (lambda m: initlab.diagnose(m, X[:0]), "x: is empty"),
    "no parameters": (lambda m: initlab.diagnose(nn.ReLU(), X), "has no parameters"),
    "no scalar": (lambda m: initlab.diagnose(m, X, loss=lambda out: out), "must give a tensor of one number"),
    "cut off": (lambda m: initlab.diagnose(m, X, loss=lambda out: out.sum().detach()), "loss: has no gradient"),
    "lazy": (lambda m: initlab.diagnose(nn.Sequential(nn.LazyLinear(3)), X), "has no shape yet"),
    "meta": (lambda m: initlab.diagnose(nn.Linear(64, 3, device="meta"), X), "on the meta device"),
    "no optimizer": (lambda m: initlab.diagnose(m, X, optimizer="sgd"), "must be a torch.optim.Optimizer"),  # type: ignore[arg-type]
    "another's": (lambda m: initlab.diagnose(m, X, optimizer=sgd(nn.Linear(2, 2))), "holds none of the model's"),
    "half a step": (lambda m: initlab.diagnose(m, X, optimizer=sgd(m), steps=1.5), "steps=1.5: must be a whole"),  # type: ignore[arg-type]
    "steps alone": (lambda m: initlab.diagnose(m, X, steps=3), "without an optimizer"),
    "reentrant": (lambda m: initlab.diagnose(Checkpointed(), X.clone()), "give it use_reentrant=False"),
    "y alone": (lambda m: initlab.diagnose(m, X, torch.zeros(8)), "y without a loss"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str) -> None:
    torch.manual_seed(0)
    model = mlp(3, 64, nn.ReLU, RELU)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    call, text = BAD[name]
    with pytest.raises(initlab.UsageError, match=text) as error:
        call(model)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_closure_that_is_evaluated_often() -> None:
    torch.manual_seed(0)
    model, y = mlp(3, 64, nn.ReLU, RELU), torch.randint(0, 10, (8,))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01)
    assert initlab.diagnose(model, X, y, cross_entropy, optimizer, steps=2).ok
    assert optimizer.state == {}


class Masked(nn.Module):
    """torch's encoder with a causal mask of -inf."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(x, mask=mask)


class Timed(nn.Module):
    """A time from 0 to 999 as sines: its size is none of the weights' business."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.time, self.b = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(32) / 8.0)
        return self.b(torch.relu(self.a(x) + self.time(torch.cat([angles.sin(), angles.cos()], -1))))


CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)
INPUTS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "a mask of -inf": (Masked, (torch.randn(2, 6, 32), CAUSAL)),
    "a mask of True": (Masked, (torch.randn(2, 6, 32), CAUSAL < 0)),
    "a mask of -1e9": (Masked, (torch.randn(2, 6, 32), CAUSAL.clamp(min=-1e9))),
    "a time": (Timed, (torch.randn(16, 8), torch.rand(16) * 999)),
    "one-hot": (lambda: nn.Sequential(nn.Linear(1000, 8)), torch.eye(1000)[:32]),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_only_look_odd(name: str) -> None:
    torch.manual_seed(0)
    make, x = INPUTS[name]
    assert initlab.diagnose(make(), x).ok


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm, self.head = nn.Embedding(50, 64), nn.LSTM(64, 64, 2, batch_first=True), nn.Linear(64, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(x))[0])


def norms() -> nn.Module:
    parts = (part for _ in range(6) for part in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()))
    return nn.Sequential(*parts, nn.Linear(64, 10))


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any], str, str]] = {
    "table x1000": (Language, lambda m: m.table.weight.mul_(1000), "exploding", "table.weight"),
    "table 0": (Language, lambda m: m.table.weight.zero_(), "vanishing", "table.weight"),
    "gates shut": (Language, lambda m: m.lstm.bias_ih_l0.fill_(-50), "saturated", "lstm.bias_ih_l0"),
    "gates saturated": (Language, lambda m: m.lstm.weight_hh_l0.mul_(100), "saturated", "lstm.weight_hh_l0"),
    "means": (
        norms,
        lambda m: [nn.init.uniform_(p) for p in m.parameters() if p.ndim > 1],
        "weights-with-a-mean",
        "0.weight",
    ),
    "columns": (norms, lambda m: m[3].weight.copy_(m[3].weight[:, :1].expand(64, 64)), "symmetric", "3.weight"),
    "norm x100": (norms, lambda m: m[7].weight.mul_(100), "exploding", "7"),
    "norm 0": (norms, lambda m: m[7].weight.zero_(), "vanishing", "7"),
    "norm's bias": (norms, lambda m: m[7].bias.fill_(-50), "bias-too-large", "7"),
    "all nan": (norms, lambda m: [p.fill_(torch.nan) for p in m.parameters()], "non-finite", "0.weight"),
    "all alike": (norms, lambda m: [p.fill_(0.01) for p in m.parameters() if p.ndim > 1], "symmetric", "0.weight"),
    "negative": (
        lambda: mlp(6, 64, nn.ReLU, RELU),
        lambda m: m[4].weight.copy_(-m[4].weight.abs()),
        "weights-with-a-mean",
        "4.weight",
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_faults_of_other_modules_are_one_finding(name: str) -> None:
    make, change, rule, where = MODULES[name]
    torch.manual_seed(0)
    x = torch.randint(0, 50, (4, 16)) if make is Language else torch.randn(32, 64)
    assert initlab.diagnose(make(), x).ok
    model = make()
    with torch.no_grad():
        change(model)
    verdict = initlab.diagnose(model, x)
    assert [(one.rule, one.name) for one in verdict.errors] == [(rule, where)], str(verdict)


class Raw(nn.Module):
    """Matrices kept as (inputs, outputs), which nn.init takes the other way round."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (32, 256, 64, 512, 10)
        shapes = pairwise(sizes)
        self.w = nn.ParameterList([nn.Parameter(nn.init.kaiming_normal_(torch.empty(*shape))) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        for k, w in enumerate(self.w):
            x = x @ w if k == 3 else torch.relu(x @ w)
        return x


def test_fans_the_wrong_way_round() -> None:
    torch.manual_seed(0)
    model, x = Raw(), torch.randn(32, 32)
    (error,) = initlab.diagnose(model, x).errors
    assert error.rule == "fans-swapped" and error.name == "w.0" and len(error.factors) == 4
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, factor in error.factors.items():
            parameters[name].mul_(factor)
    assert initlab.diagnose(model, x).ok


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("old", [False, True])
def test_weights_that_are_computed(old: bool) -> None:
    """Healthy under either norm, also when the attribute is stale; a magnitude that was forgotten is found."""
    utils = nn.utils if old else nn.utils.parametrizations
    for norm in (utils.weight_norm, utils.spectral_norm):
        torch.manual_seed(0)
        model = mlp(6, 64, nn.ReLU, RELU)
        for layer in model:
            if isinstance(layer, nn.Linear):
                norm(layer)
        optimizer = sgd(model)
        for _ in range(2):
            assert [one.rule for one in initlab.audit(model).verdict.errors] == []
            assert initlab.diagnose(model, X).ok
            cross_entropy(model(X), torch.zeros(8, dtype=torch.long)).backward()
            optimizer.step()
    model = nn.Sequential(*[part for _ in range(10) for part in (utils.weight_norm(nn.Linear(64, 64)), nn.ReLU())])
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight_v if old else layer.parametrizations.weight.original1)  # type: ignore[union-attr,arg-type]
    assert [one.rule for one in initlab.diagnose(model, X).errors] == ["init-lost"]


def test_what_number_formats_would_lose() -> None:
    """Against a real cast: a gradient 1e-6 times as large, an input beyond 65504; the scale keeps all and no more."""
    torch.manual_seed(0)
    model, x = mlp(3, 64, nn.ReLU, RELU), torch.randn(8, 64)

    def small(out: Tensor) -> Tensor:
        return 1e-7 * out.square().mean()

    verdict = initlab.diagnose(model, x, loss=small, formats=["float16", "bfloat16"])
    assert verdict.ok and [one.rule for one in verdict] == ["number-format"]
    scale = 2.0 ** verdict.findings[0].evidence["log2_scale"]
    small(model(x)).backward()
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    rows = verdict.frame[verdict.frame["direction"] == "backward"]
    top = float(rows[["min", "max"]].abs().max().max())
    assert largest <= top and top * scale <= 65504 < 2 * top * scale
    assert "float16_underflow" in verdict.frame and initlab.diagnose(model, x, formats=["float64"]).findings == ()
    with torch.no_grad():
        model[2].weight.mul_(1e3)
        model[4].weight.mul_(1e3)
    found = [one for one in initlab.diagnose(model, 10 * x, formats=["float16"]) if one.rule == "number-format"]
    assert found and found[0].direction == "forward" and found[0].layer >= 2


class Mapped(nn.Module):
    """A layer that is called inside of torch.vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(torch.vmap(self.a)(x)))


def test_buffers_and_random_numbers_are_kept_where_weights_are_drawn_anew() -> None:
    torch.manual_seed(0)
    parts = [nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    model = nn.Sequential(*parts, nn.Linear(64, 4))
    with torch.no_grad():
        model[2].weight.zero_()  # type: ignore[operator,union-attr]
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    initlab.audit(model)
    assert [one.rule for one in initlab.diagnose(model, X.clone().requires_grad_()).errors] == ["vanishing"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert initlab.diagnose(Mapped(), X).ok


def test_several_optimizers_take_one_step_together() -> None:
    torch.manual_seed(0)
    model, y = mlp(3, 64, nn.ReLU, RELU), torch.randint(0, 10, (8,))
    first, second = sgd(model[0]), torch.optim.Adam(model[2:].parameters(), lr=1e-3)  # type: ignore[index,union-attr]
    assert initlab.diagnose(model, X, y, cross_entropy, [first, second], steps=2).ok
    second.param_groups[0]["lr"] = 10.0
    verdict = initlab.diagnose(model, X, y, cross_entropy, [first, second], steps=2)
    assert [one.rule for one in verdict.errors] == ["update-too-large"] and second.state == {}


@pytest.mark.parametrize(
    ("target", "factor", "rule"), [(1.0, 1.0, None), (1e6, 1.0, "loss-scale"), (1.0, 1e-30, "loss-scale")]
)
def test_the_scale_of_a_loss(target: float, factor: float, rule: str | None) -> None:
    torch.manual_seed(0)
    model = mlp(3, 64, nn.ReLU, RELU)
    verdict = initlab.diagnose(model, X, loss=lambda out: factor * (out - target).square().mean())
    assert verdict.ok and [one.rule for one in verdict] == ([] if rule is None else [rule])
