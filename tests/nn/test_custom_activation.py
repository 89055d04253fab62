import math

import pytest
import torch
from torch.nn import functional

from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS, gain
from initlab.nn.custom_activation import as_activation, name_of, numerical


@pytest.mark.parametrize(
    ("function", "kinks"),
    [
        (torch.relu, (0.0,)),
        (functional.hardtanh, (-1.0, 1.0)),
        (functional.relu6, (0.0, 6.0)),
        (functional.hardswish, (-3.0, 3.0)),
        (torch.tanh, ()),
        (functional.softplus, ()),
        (torch.sin, ()),
        (lambda z: torch.relu(z - 0.3), (0.3,)),
    ],
)
def test_kinks_are_found_where_they_are(function, kinks) -> None:  # type: ignore[no-untyped-def]
    assert as_activation(function).kinks == pytest.approx(kinks, abs=1e-8)


@pytest.mark.parametrize("name", ["relu", "tanh", "selu", "silu"])
@pytest.mark.parametrize("kind", ["chi", "rms", "std"])
def test_a_function_of_ones_own_has_the_gains_of_its_twin(name: str, kind: str) -> None:
    twin = as_activation(ACTIVATIONS[name].module())
    assert numerical(twin) and not numerical(ACTIVATIONS[name])
    assert gain(twin, kind) == pytest.approx(gain(name, kind), rel=1e-10)


def test_numerical_slopes() -> None:
    z = torch.tensor([-3.0, -1e-5, 0.0, 1e-5, 2.0], dtype=torch.float64)
    row = as_activation(functional.elu)
    expected = torch.where(z > 0, 1.0, torch.exp(z))
    torch.testing.assert_close(row.slope(z), expected, rtol=1e-3, atol=0)  # next to a kink the slope of its side
    away = z.abs() > 0.1
    torch.testing.assert_close(row.slope(z)[away], expected[away], rtol=1e-9, atol=0)


def test_names() -> None:
    assert name_of("relu") == "relu" == name_of(ACTIVATIONS["relu"])
    assert name_of(torch.sin) == "sin"


def test_what_is_no_activation_is_said() -> None:
    cases = [
        (lambda z: torch.softmax(z, -1), "not an elementwise"),
        (lambda z: z.sum(), "argument's shape"),
        (torch.log, "not finite at z="),
        (lambda z: 1 / z, "not finite at z=0"),
        (lambda z: 1 / (z - 0.5), "not finite at z=0.5"),
        (lambda z: z @ z @ z, "cannot be called"),
        (3.0, "must be a name"),
        ("reluu", "did you mean relu"),
    ]
    for bad, text in cases:
        with pytest.raises(UsageError, match=text) as said:
            as_activation(bad)  # type: ignore[arg-type]
        assert "\n" not in str(said.value)
    with pytest.raises(UsageError, match="0 almost everywhere"):
        gain(as_activation(lambda z: 0 * z + 1), "chi")
    assert math.isfinite(gain(as_activation(torch.sign), "rms"))
