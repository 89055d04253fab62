"""What rows are called: by what is computed, numbered by the flow of data, no two with the same words."""

import threading

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import initlab
from initlab.errors import UsageError

KEYS = ["stage", "implementation", "seed", "step", "layer", "tensor", "direction", "name", "part", "call", "pass"]


def words(rows: pd.DataFrame) -> dict[str, str]:
    """The word of every module's output."""
    outputs = rows[(rows["direction"] == "forward") & (rows["part"] == "") & (rows["op"] != "input")]
    return dict(zip(outputs["name"], outputs["tensor"], strict=True))


def test_outputs_are_called_by_what_computes_them() -> None:
    model = nn.Sequential(
        nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.PReLU(), nn.Dropout(0.1), nn.Flatten(0, 1),
        nn.Identity(), nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4, affine=False), nn.Softplus(), nn.Linear(4, 2),
    )  # fmt: skip
    rows = initlab.measure(model, torch.randint(9, (5, 3)))
    assert words(rows) == {
        "0": "embedding", "1": "norm", "2": "preactivation", "3": "activation", "4": "other", "5": "other",
        "6": "other", "7": "preactivation", "8": "norm", "9": "activation", "10": "preactivation",
    }  # fmt: skip
    layers = rows[(rows["direction"] == "forward") & (rows["part"] == "")].set_index("name")["layer"].to_dict()
    assert layers == {"0": 1, "1": 2, "2": 3, "3": 3, "4": 3, "5": 3, "6": 3, "7": 4, "8": 4, "9": 4, "10": 5}
    slope = rows[(rows["name"] == "3") & (rows["part"] == "weight")]
    assert list(slope["tensor"]) == ["weight"] and list(slope["layer"]) == [3]


class Named(nn.Module):
    """Parameters whose names say the wrong thing."""

    def __init__(self) -> None:
        super().__init__()
        self.b1, self.relative_position_bias_table = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(7, 3))
        self.w, self.gamma, self.row = (nn.Parameter(torch.ones(n)) for n in (4, 4, 4))
        self.shift = nn.Parameter(torch.ones(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w * self.gamma + self.b1 + self.shift + self.row + self.relative_position_bias_table.mean()


def test_weights_and_biases_are_told_by_shape_and_use() -> None:
    rows = initlab.measure(Named(), torch.randn(5, 4))
    found = dict(zip(rows["part"], rows["tensor"], strict=True))
    found.pop("")
    assert found == {
        "b1": "bias", "relative_position_bias_table": "weight", "w": "weight", "gamma": "weight", "row": "bias",
        "shift": "bias",
    }  # fmt: skip
    rnn = initlab.measure(nn.LSTM(3, 4), torch.randn(2, 5, 3))
    assert {part: word for part, word in zip(rnn["part"], rnn["tensor"], strict=True) if "_l0" in part} == {
        "weight_ih_l0": "weight", "weight_hh_l0": "weight", "bias_ih_l0": "bias", "bias_hh_l0": "bias",
    }  # fmt: skip
    line = initlab.measure(nn.Linear(1, 1), torch.randn(5, 1))
    assert sorted(line["tensor"]) == ["activation", "bias", "preactivation", "weight"]


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_second_backward_pass_through_one_graph_has_rows_of_its_own(optimizer: bool) -> None:
    """A gradient penalty: the norm of the gradient is part of the loss; both passes are there, each with its values."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)), torch.randn(8, 5, requires_grad=True)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    caught: list[Tensor] = []
    with initlab.probe(model, optimizer=sgd if optimizer else None) as p:
        z = model[0](x)
        z.register_hook(lambda g: caught.append(g.detach().clone()))
        out = model[2](model[1](z))
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (out.mean() + slope.square().sum(-1).mean()).backward()
        if optimizer:
            sgd.step()
        else:
            model(x)
    rows = p.frame()
    assert not rows.duplicated(KEYS).any()
    if optimizer:
        found = rows[(rows["name"] == "0") & (rows["part"] == "") & (rows["direction"] == "backward")]
        assert list(found["pass"]) == [0, 1] and len(caught) == 2
        assert list(found["rms"]) == pytest.approx(
            [float(g.double().square().mean().sqrt()) for g in caught], rel=1e-12
        )


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_are_numbered_by_the_flow_of_data_under_checkpoints(reentrant: bool) -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body, self.out = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(checkpoint(self.body, self.head(x), use_reentrant=reentrant))

    model = Checked()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with initlab.probe(model, optimizer=optimizer) as p:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    rows = p.frame()
    layers = rows[rows["name"] != ""].groupby("name", observed=True)["layer"].agg(set).to_dict()
    assert layers == {"head": {1}, "body.0": {2}, "body.1": {2}, "out": {3}}
    assert not rows.duplicated(KEYS).any()


def test_several_threads_are_refused_and_one_of_ones_own_is_not() -> None:
    meeting = threading.Barrier(2)

    class Wait(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not meeting.broken:
                meeting.wait()
            return x

    model = nn.Sequential(nn.Linear(4, 4), Wait(), nn.ReLU())
    errors: list[BaseException] = []

    def call() -> None:
        try:
            model(torch.randn(3, 4))
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append(error)
            meeting.abort()

    watched = initlab.probe(model, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    with pytest.warns(UserWarning, match="no optimizer that holds"), watched:
        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {type(error) for error in errors} == {UsageError} and "several threads" in str(errors[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    meeting.abort()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(3, 4)).sum().backward()
            optimizer.step()

    with initlab.probe(model, optimizer=optimizer) as p:
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    assert set(p.frame()["step"]) == {0, 1}


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        (nn.LSTM(6, 4, 2), ["output", "h_n", "c_n"]),
        (nn.GRU(6, 4), ["output", "h_n"]),
        (nn.RNN(6, 4), ["output", "h_n"]),
        (nn.LSTMCell(6, 4), ["h_1", "c_1"]),
        (nn.GRUCell(6, 4), [""]),
        (nn.MultiheadAttention(6, 2), ["attn_output", "attn_output_weights"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_outputs_have_the_names_that_torch_has_for_them(module: nn.Module, parts: list[str]) -> None:
    """And each row is of the tensor that it names; the sequence and its last state are not confused."""
    x = torch.randn(5, 6) if isinstance(module, nn.RNNCellBase) else torch.randn(5, 3, 6)
    given = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
    with initlab.probe(module) as p:
        found = module(*given)
    rows = p.frame().query("direction == 'forward' and layer == 1 and tensor in ('preactivation', 'attention')")
    assert rows["part"].tolist() == parts
    flat = (
        [found] if isinstance(found, Tensor) else [t for one in found for t in (one if type(one) is tuple else [one])]
    )
    stds = [float(t.detach().double().std(correction=0)) for t in flat]
    assert rows["std"].tolist() == pytest.approx(stds, rel=1e-6)
    assert rows["tensor"].tolist() == ["attention" if "weights" in part else "preactivation" for part in parts]


def test_the_gradient_by_the_input_is_measured_where_the_input_asks_for_it() -> None:
    net, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(7, 6)
    quiet = initlab.measure(net, x, loss=lambda out: out.square().sum())
    assert set(quiet.query("layer == 0")["direction"]) == {"forward"}
    x.requires_grad_()
    (row,) = initlab.measure(net, x, loss=lambda out: out.square().sum()).query(
        "layer == 0 and direction == 'backward'"
    )["q"]
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    assert row == pytest.approx(float(expected.double().square().mean()), rel=1e-6) and x.grad is None
