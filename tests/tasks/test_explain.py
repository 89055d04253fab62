"""The explanation tells of the pass that is really made, and its symbolic rules are right by SymPy's own reckoning."""

import inspect

import pytest
import sympy
import torch

from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.loss_table import LOSSES
from initlab.scratch.classes import FirstLin, Lin
from initlab.tasks.course.explain import SETS, SYMBOLIC, explain

NAMES = {name: sympy.Symbol(name, real=True) for name in ("z", "inp", "w", "b", "out", "targ", "hit")}
NAMES |= {name: sympy.Symbol(name, positive=True) for name in ("rest", "N")}
POINTS = [-6.5, -2.0, -0.75, -1e-3, 1e-3, 0.5, 1.25, 3.0, 7.5]


def parsed(text: str) -> sympy.Expr:
    """SymPy's reading of a stored text; `N` is a symbol here and not SymPy's function."""
    return sympy.sympify(text, locals=NAMES)


def cases() -> list[tuple[str, str]]:
    return [(rule, variable) for rule, row in SYMBOLIC.items() for variable in row.derivatives]


def test_every_activation_and_loss_has_its_rule() -> None:
    assert set(SYMBOLIC) == {*ACTIVATIONS, *LOSSES, "lin"}


@pytest.mark.parametrize(("rule", "variable"), cases())
def test_stored_derivatives_are_sympys(rule: str, variable: str) -> None:
    """The difference of the two is 0 at every point, to 30 digits; a derivative 1 % off is not."""
    row = SYMBOLIC[rule]
    stored = parsed(row.derivatives[variable])
    difference = sympy.diff(parsed(row.formula), NAMES[variable]) - stored
    rest = {"inp": 0.3, "w": -1.7, "b": 0.4, "targ": 0.9, "hit": 1, "rest": 2.5, "N": 8}
    for point in POINTS:
        at = {NAMES[k]: sympy.Rational(str(v)) for k, v in rest.items()} | {NAMES[variable]: sympy.Rational(str(point))}
        value = abs(stored.evalf(30, subs=at))
        assert abs(difference.evalf(30, subs=at)) <= 1e-15 * value  # the constants have 16 digits
        assert value == 0 or abs((difference + stored / 100).evalf(30, subs=at)) > 1e-3 * value


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_code_computes_the_stored_formulas(name: str) -> None:
    """phi, phi' and the pulled-back gradient in float64 against 30 digits; relative to the value itself, or to what
    rounding leaves where terms of size 1 + |z| cancel, as in 1 - tanh(z)^2 and in the lower tail of gelu.
    """
    row, symbolic = ACTIVATIONS[name], SYMBOLIC[name]
    z = torch.tensor(POINTS, dtype=torch.float64)
    g = torch.full_like(z, -3.0)
    for text, found in (
        (symbolic.formula, row.phi(z)),
        (symbolic.derivatives["z"], row.slope(z)),
        (f"-3*({symbolic.derivatives['z']})", row.pull_back(g, z)),
    ):
        exact = [parsed(text).evalf(30, subs={NAMES["z"]: sympy.Rational(str(point))}) for point in POINTS]
        for point, value, wanted in zip(POINTS, found.tolist(), exact, strict=True):
            assert abs(value - wanted) <= 1e-13 * abs(wanted) + 3 * torch.finfo(torch.float64).eps * (1 + abs(point))


def test_losses_compute_the_stored_formulas() -> None:
    """The gradient of every entry, and the loss as the sum over rows; K = 3 classes, N = 4."""
    out = torch.tensor([[0.3, -1.2, 2.0], [1.5, 0.1, -0.7], [0.0, 0.4, 0.9], [-2.0, 3.0, 0.5]], dtype=torch.float64)
    targ = torch.tensor([2, 0, 1, 1])
    g = LOSSES["cross_entropy"].grad(out, targ)
    stored = parsed(SYMBOLIC["cross_entropy"].derivatives["out"])
    for n in range(4):
        for k in range(3):
            rest = sum(out[n, j].exp().item() for j in range(3) if j != k)
            at = {"out": out[n, k].item(), "rest": rest, "hit": int(targ[n] == k), "N": 4}
            assert float(stored.evalf(subs=at_symbols(at))) == pytest.approx(g[n, k].item(), rel=1e-13)
    column, numbers = out[:, :1], out[:, 1]
    g = LOSSES["mse"].grad(column, numbers)
    total = 0.0
    for n in range(4):
        at = {"out": column[n].item(), "targ": numbers[n].item(), "N": 4}
        wanted = parsed(SYMBOLIC["mse"].derivatives["out"]).evalf(subs=at_symbols(at))
        assert float(wanted) == pytest.approx(g[n].item(), rel=1e-13)
        total += float(parsed(SYMBOLIC["mse"].formula).evalf(subs=at_symbols(at)))
    assert total == pytest.approx(LOSSES["mse"].forward(column, numbers).item(), rel=1e-13)


def at_symbols(values: dict[str, float]) -> dict[sympy.Symbol, float]:
    return {NAMES[name]: value for name, value in values.items()}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ["relu", "linear", "gelu"])
def test_who_sets_what(activation: str, loss: str) -> None:
    """Every .g is set once, by the layer above; what a step reads was set in the step before it."""
    steps = explain(depth=2, width=5, batch=4, activation=activation, loss=loss).steps
    backward = steps[steps["direction"] == "backward"]
    outputs = {"z1", "a1", "z2", "a2", "z3"}
    parameters = {f"{letter}{k}" for letter in "wb" for k in (1, 2, 3)}
    assert sorted(backward["tensor"]) == sorted(f"{name}.g" for name in outputs | parameters)
    assert list(dict.fromkeys(backward["name"])) == [
        loss, "lin3", f"{activation}2", "lin2", f"{activation}1", "lin1",
    ]  # fmt: skip
    top, others = backward[backward["name"] == loss], backward[backward["name"] != loss]
    assert list(top["sets"]) == ["self.inp.g"] and list(top["reads"]) == [""]
    assert (others["set_in"] == others["step"] - 1).all()
    by_tensor = backward.set_index("tensor")
    for row in others.itertuples():
        assert by_tensor.loc[row.reads, "step"] == row.set_in and by_tensor.loc[row.reads, "name"] == row.set_by
        assert by_tensor.loc[row.reads, "read_by"] == row.name
    assert set(backward[backward["read_by"] == "optimizer"]["tensor"]) == {f"{name}.g" for name in parameters}


def test_the_linear_layers_lines_are_those_of_its_class() -> None:
    for layer in (Lin, FirstLin):
        source = inspect.getsource(layer.backward).replace("self.", "")
        lines = [f"{name} = {formula}" for name, formula in SETS[layer.__name__].items() if name.endswith(".g")]
        assert [line.strip() for line in source.splitlines()[1:]] == lines


def test_shapes_and_norms_are_those_of_the_pass() -> None:
    """A gradient has the shape of its value; the same seed gives the same rows, another seed others."""
    first, again = (explain(depth=1, width=5, batch=4, seed=7).steps for _ in range(2))
    assert first.equals(again)
    assert not first.equals(explain(depth=1, width=5, batch=4, seed=8).steps)
    shapes = dict(zip(first["tensor"], first["shape"], strict=True))
    assert shapes["z1"] == shapes["z1.g"] == "4x5" and shapes["w1.g"] == "64x5" and shapes["loss"] == "number"
    assert (first["norm"] > 0).all() and (first["rms"] <= first["norm"]).all()


def test_the_text_answers_the_questions() -> None:
    told = str(explain(depth=1, width=5, batch=4))
    assert "Where does self.out.g come from?" in told and "Why inp.g in the loss?" in told
    assert "mse.backward() reads no gradient: dL/dL = 1" in told
    assert "lin2.backward() reads self.out.g, which is z2.g, set by mse in step 5" in told
    assert "relu: d/dz [Piecewise((z, z > 0), (0, True))] = Piecewise((1, z > 0), (0, True))" in told
    assert "xb.g:" not in told
    alone = explain(depth=0, activation="selu", loss="cross_entropy")
    assert set(alone.rules["rule"]) == {"lin", "cross_entropy"}


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ({"activation": "rleu"}, "did you mean relu"),
        ({"loss": "mes"}, "did you mean mse"),
        ({"depth": -1}, "train.depth=-1"),
        ({"batch": 0}, "train.batch=0"),
        ({"dtype": "float23"}, "dtype=float23"),
    ],
)
def test_mistakes_end_in_one_line(mistake: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        explain(**mistake)
    assert "\n" not in str(caught.value)
