"""`init_` against numbers computed by hand: the std of each part, at 5 standard errors, and what it must not be."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init as torch_init
from torch.nn import utils
from torch.nn.utils import parametrizations, prune

from initlab.errors import UsageError
from initlab.models.initialize import init_
from initlab.models.laws import recognize_law
from initlab.nn.activations import gain
from initlab.nn.init import RULES, Rule


def has_std(x: Tensor, std: float) -> bool:
    """Within 5 standard errors of a normal sample, the widest of those drawn here."""
    return abs(float(x.detach().double().std(correction=0)) / std - 1) <= 5 / math.sqrt(2 * x.numel())


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Mixer(nn.Module):
    """Residual branches without norms behind them, as in a pre-norm Transformer."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(64, 128) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(128, 64) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        return x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(500, 64), nn.Linear(64, 500, bias=False)
        self.own = nn.Embedding(300, 64, padding_idx=7)
        self.head.weight = self.table.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(i) + self.own(i)))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Block(16), Block(16), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def test_an_mlp_has_the_gain_of_what_follows() -> None:
    net = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 150), nn.Tanh(), nn.Linear(150, 50))
    report = init_(net, "kaiming", seed=1, quiet=True)
    stds = {0: math.sqrt(2 / 100), 2: gain("tanh") / math.sqrt(200), 4: 1 / math.sqrt(150)}
    for k, std in stds.items():
        assert has_std(net[k].weight, std) and not has_std(net[k].weight, 1.1 * std)
        assert recognize_law(net[k].weight).name == "normal" and not net[k].bias.any()
    assert list(report.frame["gain"].dropna()) == pytest.approx([math.sqrt(2), gain("tanh"), 1])
    assert all(name in str(report) for name in ("0.weight", "relu follows", "tanh follows", "the output follows"))


@pytest.mark.parametrize("rule", ["naive", "small", "lecun", "xavier", "orthogonal", "torch_default"])
def test_every_rule_has_its_scale_and_its_law(rule: str) -> None:
    net = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))
    init_(net, rule, seed=0, quiet=True)
    row = RULES[rule]
    law = recognize_law(net[0].weight)
    assert law.name == {"orthogonal": "orthogonal", "uniform": "uniform"}.get(row.distribution, "normal")
    std = row.std_for("relu", (128, 256))
    if rule == "orthogonal":
        assert law.scale == pytest.approx(math.sqrt(2), rel=1e-5)
    else:
        assert has_std(net[0].weight, std) and not has_std(net[0].weight, 1.1 * std)
    assert bool(net[0].bias.any()) == (rule == "torch_default")


@pytest.mark.parametrize(
    ("rule", "options", "std", "law"),
    [
        ("xavier_uniform_", {}, math.sqrt(2 * 2 / (128 + 256)), "uniform"),
        ("xavier_normal", {"gain": 3.0}, 3 * math.sqrt(2 / (128 + 256)), "normal"),
        (torch_init.kaiming_normal_, {"mode": "fan_out"}, math.sqrt(2 / 256), "normal"),
        ("kaiming_uniform_", {}, math.sqrt(2 / 128), "uniform"),
        ("normal_", {"std": 0.02}, 0.02, "normal"),
        ("trunc_normal_", {"std": 0.5, "a": -1.0, "b": 1.0}, 0.5 * 0.8796, "cut normal"),
        (lambda w: w.uniform_(-0.1, 0.1), {}, 0.1 / math.sqrt(3), "uniform"),
        (lambda w: torch.randn(w.shape) * 0.3, {}, 0.3, "normal"),
        (Rule(gain=0.5, distribution="truncated_normal"), {}, 0.5 / math.sqrt(128), "cut normal"),
        ("kaiming", {"gain": 2.0, "mode": "fan_out"}, 2 / math.sqrt(256), "normal"),
    ],
)
def test_torchs_initializers_and_ones_own(rule: Any, options: dict[str, Any], std: float, law: str) -> None:
    net = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))
    init_(net, rule, seed=0, quiet=True, **options)
    assert has_std(net[0].weight, std) and not has_std(net[0].weight, 1.1 * std)
    assert recognize_law(net[0].weight).name == law
    assert not net[0].bias.any()


def test_identities_fit_the_layer() -> None:
    net = nn.Sequential(nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 24))
    for rule in ("eye_", "dirac_"):
        init_(net, rule, quiet=True)
        assert torch.equal(net[0].weight, torch_init.dirac_(torch.empty(6, 3, 3, 3), 2))
        assert torch.equal(net[3].weight, torch.eye(24))


def test_convolutions_are_counted_as_they_are_used() -> None:
    """fan_in of a depthwise kernel is its taps; of a transposed convolution with stride s, inputs times taps / s^2."""
    net = nn.Sequential(
        nn.Conv2d(3, 64, 5), nn.ReLU(), nn.Conv2d(64, 64, 3, groups=64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2), nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, groups=4), nn.BatchNorm2d(16),
    )  # fmt: skip
    init_(net, "kaiming", seed=0, quiet=True)
    for k, fan_in in {0: 75, 2: 9, 4: 64 * 16 / 4}.items():
        assert has_std(net[k].weight, math.sqrt(2 / fan_in)) and not has_std(net[k].weight, math.sqrt(2 / fan_in) * 1.3)
    assert has_std(net[6].weight, 1 / math.sqrt(8 * 16))
    assert torch.equal(net[7].weight, torch.ones(16)) and not net[7].bias.any()
    init_(net, "orthogonal", seed=0, quiet=True)
    for kernel in net[2].weight.detach().double():  # each of the 64 groups for itself
        assert float(kernel.norm()) == pytest.approx(math.sqrt(2), rel=1e-6)
    for group in net[6].weight.detach().double().chunk(4):  # (8 inputs, 4 outputs, 4, 4)
        matrix = group.transpose(0, 1).reshape(4, -1)
        assert torch.allclose(matrix @ matrix.mT, torch.eye(4, dtype=torch.float64), atol=1e-6)


def test_gates_are_drawn_each_for_itself() -> None:
    lstm = nn.LSTM(32, 64, num_layers=2)
    report = init_(lstm, "orthogonal", seed=0, quiet=True)
    for gate in lstm.weight_hh_l1.detach().double().chunk(4):
        assert torch.allclose(gate @ gate.mT, torch.eye(64, dtype=torch.float64), atol=1e-5)
    whole = lstm.weight_hh_l1.detach().double()
    assert not torch.allclose(whole.mT @ whole, torch.eye(64, dtype=torch.float64), atol=0.5)
    assert torch.equal(lstm.bias_ih_l0, torch.cat([torch.zeros(64), torch.ones(64), torch.zeros(128)]))
    assert not lstm.bias_hh_l0.any() and "forget gate 1" in str(report)
    gru = nn.GRU(32, 64)
    init_(gru, "xavier", seed=0, quiet=True)
    for gate in gru.weight_ih_l0.chunk(3):
        assert has_std(gate, math.sqrt(2 / (32 + 64)))
    assert not has_std(gru.weight_ih_l0, math.sqrt(2 / (32 + 3 * 64))) and not gru.bias_ih_l0.any()
    init_(lstm, "torch_default", seed=0, quiet=True)
    for p in lstm.parameters():  # torch's own: all up to 1/sqrt(units)
        assert has_std(p, 1 / math.sqrt(3 * 64)) and float(p.detach().abs().max()) <= 1 / 8


def test_projections_of_attention_are_three_matrices() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    init_(layer, "xavier", torch.randn(2, 5, 64), seed=0, quiet=True)
    for part in layer.self_attn.in_proj_weight.chunk(3):
        assert has_std(part, math.sqrt(2 / 128))
    assert not has_std(layer.self_attn.in_proj_weight, math.sqrt(2 / 256))  # as torch scales it
    assert has_std(layer.self_attn.out_proj.weight, math.sqrt(2 / 128))
    assert has_std(layer.linear1.weight, math.sqrt(2) * math.sqrt(2 / 320))
    assert has_std(layer.linear2.weight, math.sqrt(2 / 320))
    init_(layer, "orthogonal", seed=0, quiet=True)
    query, key, _ = layer.self_attn.in_proj_weight.detach().double().chunk(3)
    assert torch.allclose(query @ query.mT, torch.eye(64, dtype=torch.float64), atol=1e-5)
    assert not torch.allclose(query, key)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, utils.weight_norm], ids=["new", "old"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_gives_the_weight_that_was_wanted(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """The same as without it; its magnitudes and directions stay parameters."""
    bare = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Conv1d(1, 8, 3))
    net = nn.Sequential(wrap(nn.Linear(64, 128)), nn.ReLU(), wrap(nn.Conv1d(1, 8, 3)))
    parameters = list(net.parameters())
    init_(bare, "kaiming", seed=0, quiet=True)
    report = init_(net, "kaiming", seed=0, quiet=True)
    for k in (0, 2):
        assert torch.allclose(net[k].weight, bare[k].weight, rtol=1e-5, atol=1e-7)
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True)) and "WeightNorm" in str(report)


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_what_decides_on_its_weight_itself_is_said() -> None:
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 64))
    prune.l1_unstructured(net[2], "weight", 0.5)
    report = init_(net, "kaiming", seed=0, quiet=True)
    notes = report.frame.set_index("parameter")["note"]
    assert "SpectralNorm makes another weight" in notes["0.weight"]
    assert "L1Unstructured makes another weight" in notes["2.weight"]
    assert float(torch.linalg.matrix_norm(net[0].weight.detach(), 2)) == pytest.approx(1, rel=0.05)
    ortho = nn.Sequential(parametrizations.orthogonal(nn.Linear(64, 64)))
    init_(ortho, "orthogonal", seed=3, quiet=True)
    bare = nn.Sequential(nn.Linear(64, 64))
    init_(bare, "orthogonal", seed=3, quiet=True)
    assert torch.allclose(ortho[0].weight, bare[0].weight, atol=1e-5)


class Tanh(nn.Module):
    """A parametrization without an inverse."""

    def forward(self, w: Tensor) -> Tensor:
        return w.tanh()


def test_what_cannot_be_set_or_fitted_is_said() -> None:
    net = nn.Linear(64, 64)
    nn.utils.parametrize.register_parametrization(net, "weight", Tanh())
    assert "Tanh has no inverse" in str(init_(net, "naive", quiet=True))
    assert has_std(net.parametrizations.weight.original, 1.0)

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.w = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.zeros(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) @ self.w

    notes = init_(Partly(), "lsuv", torch.randn(32, 8), quiet=True).frame.set_index("parameter")["note"]
    assert "does not use it" in notes["unused.weight"] and "no module gives its product" in notes["w"]
    assert "so that its output has std" in notes["used.weight"]
    with warnings.catch_warnings(action="ignore"):  # that scripts are deprecated
        scripted = torch.jit.script(nn.Linear(3, 3))
    with pytest.raises(UsageError, match="scripted"):
        init_(scripted, "kaiming")


def test_shared_and_frozen_parameters_are_set_once_and_said() -> None:
    net = Tied()
    net.own.weight.requires_grad_(False)
    report = init_(net, "kaiming", seed=0, quiet=True)
    notes = report.frame.set_index("parameter")["note"]
    assert net.head.weight is net.table.weight and has_std(net.head.weight, 1 / 8)  # an output layer, not N(0, 1)
    assert "shared with head.weight" in notes["table.weight"] and "frozen" in notes["own.weight"]
    rows = torch.ones(300, dtype=torch.bool)
    rows[7] = False
    assert has_std(net.own.weight[rows], 1.0) and not net.own.weight[7].any()
    assert not net.own.weight.requires_grad
    report = init_(nn.Sequential(nn.Linear(4, 4), nn.PReLU()), "kaiming", quiet=True)
    assert not report.frame.set_index("parameter")["done"]["1.weight"] and "left as it is" in str(report)


def test_residual_branches_end_as_chosen() -> None:
    net = Mixer(3)
    report = init_(net, "kaiming", seed=0, residual="1/sqrt(2L)", quiet=True)
    for up, down in zip(net.up, net.down, strict=True):
        assert has_std(down.weight, 1 / math.sqrt(128) / math.sqrt(3)) and not has_std(down.weight, 1 / math.sqrt(128))
        assert has_std(up.weight, gain("gelu") / 8)
    assert "3 branches" in str(report)
    x = torch.randn(4, 64)
    init_(net, "kaiming", x, residual="zero", quiet=True)
    assert torch.equal(net(x), x)
    init_(net, "kaiming", residual=None, quiet=True)
    assert not torch.equal(net(x), x)
    transformer = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 3)
    init_(transformer, "xavier", torch.randn(2, 5, 32), residual="1/sqrt(2L)", seed=0, quiet=True)
    for layer in transformer.layers:  # two branches in each of three
        assert has_std(layer.linear2.weight, math.sqrt(2 / 96) / math.sqrt(6))
        assert has_std(layer.self_attn.out_proj.weight, math.sqrt(2 / 64) / math.sqrt(6))
    alone = init_(nn.Sequential(nn.Linear(3, 3)), "kaiming", residual="zero", quiet=True)
    assert "no residual branch was found" in str(alone)


def test_where_a_branch_ends_in_a_norm_the_norm_is_scaled() -> None:
    """As torchvision's zero_init_residual: each block is a ReLU at first."""
    net, x = resnet(), torch.randn(2, 3, 10, 10)
    init_(net, "kaiming", x, residual="zero", seed=0, quiet=True)
    for block in (net[3], net[4]):
        assert not block.bn2.weight.any() and block.bn1.weight.all()
        assert has_std(block.conv2.weight, 1 / 12)
        y = torch.randn(2, 16, 5, 5)
        assert torch.equal(block(y), F.relu(y))


class NormAct(nn.BatchNorm2d):
    """A norm that somebody has built an activation into."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_norms_with_parts_are_norms_and_a_branch_without_an_end_is_said() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8), nn.Flatten(), nn.Linear(8 * 36, 4))
    nn.init.normal_(net[1].weight)
    init_(net, "kaiming", torch.randn(2, 3, 8, 8), seed=0, quiet=True)
    assert torch.equal(net[1].weight, torch.ones(8)) and not net[1].bias.any()
    block = Block(8)
    block.bn2 = NormAct(8)
    init_(block, "kaiming", torch.randn(2, 8, 4, 4), residual="zero", seed=0, quiet=True)
    assert block.bn1.weight.all()

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.cell = nn.Linear(6, 6), nn.GRU(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return h + self.cell(h)[0]

    report = init_(Recurrent(), "kaiming", torch.randn(5, 2, 6), residual="zero", quiet=True)
    assert "none of the branches ends in a layer" in str(report) and report.frame["std"].iloc[2] > 0


def test_lsuv_gives_every_layer_unit_variance() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 20)
    )
    x = 5 * torch.randn(64, 3, 10, 10) + 1
    buffers = copy.deepcopy(dict(net.named_buffers()))
    report = init_(net, "lsuv", x, seed=0, quiet=True)
    h = x
    for layer in net:
        h = layer(h)
        if hasattr(layer, "weight"):
            assert float(h.detach().var(correction=0)) == pytest.approx(1, abs=RULES["lsuv"].tolerance)
    assert "so that its output has std" in str(report) and dict(net.named_buffers()) == buffers
    bare = copy.deepcopy(net)
    init_(bare, "orthogonal", gain=1.0, seed=0, quiet=True)
    assert not abs(float(bare[0](x).detach().var()) - 1) < RULES["lsuv"].tolerance
    with pytest.raises(UsageError, match="give a batch"):
        init_(net, "lsuv")


def test_mup_returns_the_learning_rates_of_its_table() -> None:
    """Yang et al. 2022, table 3, at four times the base width."""
    net = nn.Sequential(nn.Linear(10, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 5))
    report = init_(net, "mup", seed=0, quiet=True)
    assert has_std(net[2].weight, math.sqrt(2 / 200))
    assert has_std(net[4].weight, 1 / math.sqrt(200) / 2) and not has_std(net[4].weight, 1 / math.sqrt(200))
    rates = {}
    for kind, adaptive in (("adam", True), ("sgd", False)):
        groups = report.groups(0.1, adaptive)
        torch.optim.SGD(groups)
        rates[kind] = [next(g["lr"] for g in groups if any(q is p for q in g["params"])) for p in net.parameters()]
    assert rates["adam"] == pytest.approx([0.1, 0.1, 0.1 / 4, 0.1, 0.1 / 4, 0.1])
    assert rates["sgd"] == pytest.approx([0.4, 0.4, 0.1, 0.4, 0.1 / 4, 0.1])
    same = init_(net, "kaiming", quiet=True).groups(0.1)
    assert [group["lr"] for group in same] == [0.1]


def test_numbers_depend_on_seed_and_name_alone() -> None:
    small = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    large = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    state = torch.get_rng_state()
    for rule in ("kaiming", "normal_", lambda w: w.normal_()):
        init_(small, rule, seed=4, quiet=True)
        init_(large, rule, seed=4, quiet=True)
        assert torch.equal(small[0].weight, large[0].weight) or rule == "kaiming"  # what follows differs: the output
        first = large[0].weight.detach().clone()
        init_(large, rule, seed=5, quiet=True)
        assert not torch.equal(first, large[0].weight)
        init_(large, rule, seed=4, quiet=True)
        assert torch.equal(first, large[0].weight)
    assert torch.equal(state, torch.get_rng_state())
    half = copy.deepcopy(large).bfloat16()
    init_(half, "kaiming", seed=4, quiet=True)
    init_(large, "kaiming", seed=4, quiet=True)
    assert torch.equal(half[0].weight, large[0].weight.bfloat16())
    torch.manual_seed(0)
    init_(small, "kaiming", quiet=True)
    drawn = small[0].weight.detach().clone()
    init_(small, "kaiming", quiet=True)
    assert not torch.equal(drawn, small[0].weight)


def test_it_prints_what_it_returns(capsys: pytest.CaptureFixture[str]) -> None:
    report = init_(nn.Sequential(nn.Linear(3, 3)), "kaiming")
    assert capsys.readouterr().out == f"{report}\n"
    init_(nn.Sequential(nn.Linear(3, 3)), "kaiming", quiet=True)
    assert capsys.readouterr().out == ""


def explode(w: Tensor) -> None:
    if w.shape[0] == 5:
        raise ValueError("no such shape")
    w.zero_()


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("kaimin", {}, "did you mean kaiming"),
        ("sparse_", {"sparsity": 0.1}, "cannot fill 3.weight"),
        (explode, {}, r"cannot fill 4.weight of shape \(5, 8\): ValueError: no such shape"),
        (lambda w: torch.zeros(3), {}, r"gives \(3,\) for"),
        (3, {}, "rule=3: must be"),
        ("kaiming", {"gian": 2}, "did you mean gain"),
        ("kaiming", {"std": 2}, "no such parameter"),
        ("normal_", {"gain": 2}, "unexpected keyword"),
        ("kaiming", {"residual": "zeros"}, "residual='zeros': must be None"),
        ("kaiming", {"seed": -1}, "seed=-1"),
        ("kaiming", {"x": torch.randn(2, 3)}, "does not fit"),
        ("kaiming", {"gain_kind": "torch"}, "torch has no gain"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(rule: Any, options: dict[str, Any], message: str) -> None:
    net = nn.Sequential(
        nn.Linear(6, 8), nn.GELU(), nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 8, 1), nn.Linear(8, 5),
        parametrizations.weight_norm(nn.Linear(5, 5)),
    )  # fmt: skip
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UsageError, match=message) as caught:
        init_(net, rule, quiet=True, **options)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


def test_parameters_without_memory_or_shape_are_one_line() -> None:
    with pytest.raises(UsageError, match="weight is on the meta device"):
        init_(nn.Linear(3, 3, device="meta"), "kaiming")
    with warnings.catch_warnings(action="ignore"):  # that such modules are new
        lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(UsageError, match=r"0\.weight has no shape yet"):
        init_(lazy, "kaiming")
    lazy(torch.randn(2, 64))
    init_(lazy, "kaiming", quiet=True)
    assert has_std(lazy[0].weight, 1 / 8)
    with pytest.raises(UsageError, match=r"must be an nn\.Module"):
        init_("net", "kaiming")  # type: ignore[arg-type]
    assert init_(nn.ReLU(), "kaiming", quiet=True).frame.empty
