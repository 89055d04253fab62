"""The table of activations: phi, its derivative written by hand, its torch module and the gains that it needs.

A new activation is a row here, and a file conf/activation/NAME.yaml. `u` is standard normal throughout; gains assume a
preactivation of unit variance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, gelu, hardswish, leaky_relu, mish, relu6, selu, silu, softplus

from initlab.errors import UsageError, choose
from initlab.nn.saturation import measure_share
from initlab.stats.quadrature import gaussian_mean
from initlab.stats.summarize import saturated_share

SLOPE = 0.01  # of leaky_relu below zero, as in torch
GELU_SCALE, GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715  # of gelu's approximation by tanh
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. 2017, appendix A.1


@dataclass(frozen=True)
class Activation:
    """One row: phi, phi', the backward rule and the module that torch offers for the same function."""

    phi: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]  # phi'(z); at a kink the value that autograd takes
    module: Callable[[], nn.Module]
    kinks: tuple[float, ...] = ()
    largest_slope: float = 1.0  # max |phi'|: what `frac_saturated` is measured against
    backward: Callable[[Tensor, Tensor], Tensor] | None = None
    homogeneous: bool = False  # phi(k z) = k phi(z) for k > 0
    formula: str = ""  # phi of one number z, as SymPy reads it
    derivative: str = ""  # and phi'
    rectifies: bool = False  # phi(z) = max(z, 0): statistics of it can be taken in the pass that makes it
    no_slope: str = ""  # why no theory that needs phi' holds: phi jumps, or phi'^2 has no mean; "" if it does

    def pull_back(self, grad: Tensor, z: Tensor) -> Tensor:
        """dL/dz from dL/dphi: grad * phi'(z), or the row's own rule where 0 * inf must be 0 as in autograd."""
        return grad * self.slope(z) if self.backward is None else self.backward(grad, z)

    @property
    def is_fixed(self) -> bool:
        """Whether it is a row of the table, which stays what it is and takes every entry alike."""
        return id(self) in _FIXED

    def saturated_share(self, z: Tensor) -> Tensor:
        """Share of entries where |phi'| is below 5 % of its largest value, (..., N, C) -> (...)."""
        if self.is_fixed:
            return measure_share(z, self.slope, self.largest_slope)
        return saturated_share(self.slope(z), self.largest_slope)


def gelu_slope(z: Tensor) -> Tensor:
    """Phi(z) + z phi(z), the normal distribution and its density."""
    cdf = 0.5 * torch.erfc(-z * math.sqrt(0.5))
    return cdf + z * (torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))


def gelu_tanh_slope(z: Tensor) -> Tensor:
    """(1 + t)/2 + z (1 - t^2) u'/2 with t = tanh(u), u = sqrt(2/pi) (z + 0.044715 z^3)."""
    near = torch.where(z.isfinite(), z.clamp(-50, 50), z)  # beyond, tanh is 1 or -1, and z^3 would leave the format
    t = torch.tanh(GELU_SCALE * (near + GELU_CUBIC * near**3))
    return 0.5 * (1 + t) + 0.5 * near * (1 - t * t) * GELU_SCALE * (1 + 3 * GELU_CUBIC * near * near)


def sigmoid_slope(z: Tensor) -> Tensor:
    """s (1 - s), s = sigmoid(z)."""
    s = torch.sigmoid(z)
    return s * (1 - s)


def silu_slope(z: Tensor) -> Tensor:
    """s (1 + z (1 - s)), s = sigmoid(z)."""
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def mish_slope(z: Tensor) -> Tensor:
    """t + z sigmoid(z) (1 - t^2), t = tanh(softplus(z))."""
    t = torch.tanh(softplus(z))
    return t + z * torch.sigmoid(z) * (1 - t * t)


def hardswish_back(grad: Tensor, z: Tensor) -> Tensor:
    """grad times 0 below -3, z/3 + 1/2 up to 3, and 1 above."""
    return torch.where(z < -3, 0, torch.where(z > 3, grad, grad * (z / 3 + 0.5)))


def _below_zero(above: str, below: str) -> str:
    return f"Piecewise(({above}, z > 0), ({below}, True))"


ACTIVATIONS: dict[str, Activation] = {
    "linear": Activation(
        phi=lambda z: z,
        slope=torch.ones_like,
        module=nn.Identity,
        backward=lambda grad, z: grad,
        homogeneous=True,
        formula="z",
        derivative="1",
    ),
    "relu": Activation(
        phi=torch.relu,
        slope=lambda z: (z > 0).to(z.dtype),
        module=nn.ReLU,
        kinks=(0.0,),
        backward=lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0),
        homogeneous=True,
        formula=_below_zero("z", "0"),
        derivative=_below_zero("1", "0"),
        rectifies=True,
    ),
    "leaky_relu": Activation(
        phi=partial(leaky_relu, negative_slope=SLOPE),
        slope=lambda z: torch.where(z > 0, torch.ones_like(z), SLOPE),
        module=partial(nn.LeakyReLU, SLOPE),
        kinks=(0.0,),
        backward=lambda grad, z: torch.where(z > 0, grad, SLOPE * grad),
        homogeneous=True,
        formula=_below_zero("z", f"{SLOPE}*z"),
        derivative=_below_zero("1", f"{SLOPE}"),
    ),
    "tanh": Activation(
        phi=torch.tanh,
        slope=lambda z: 1 - torch.tanh(z).square(),
        module=nn.Tanh,
        formula="tanh(z)",
        derivative="1 - tanh(z)**2",
    ),
    "sigmoid": Activation(
        phi=torch.sigmoid,
        slope=sigmoid_slope,
        module=nn.Sigmoid,
        largest_slope=0.25,
        formula="1/(1 + exp(-z))",
        derivative="exp(-z)/(1 + exp(-z))**2",
    ),
    "gelu": Activation(  # z Phi(z), Hendrycks & Gimpel 2016; exact, not the tanh approximation
        phi=gelu,
        slope=gelu_slope,
        module=nn.GELU,
        largest_slope=1.1289043,  # at z = sqrt(2)
        formula="z*(1 + erf(z/sqrt(2)))/2",
        derivative="(1 + erf(z/sqrt(2)))/2 + z*exp(-z**2/2)/sqrt(2*pi)",
    ),
    "silu": Activation(  # z sigmoid(z), Elfwing et al. 2017
        phi=silu,
        slope=silu_slope,
        module=nn.SiLU,
        largest_slope=1.0998393,  # at z = 2.3993573
        formula="z/(1 + exp(-z))",
        derivative="1/(1 + exp(-z)) + z*exp(-z)/(1 + exp(-z))**2",
    ),
    "selu": Activation(  # Klambauer et al. 2017
        phi=selu,
        slope=lambda z: SELU_SCALE * torch.where(z > 0, 1.0, SELU_ALPHA * torch.exp(z.clamp(max=0))),
        module=nn.SELU,
        kinks=(0.0,),
        largest_slope=SELU_SCALE * SELU_ALPHA,
        formula=f"{SELU_SCALE}*" + _below_zero("z", f"{SELU_ALPHA}*(exp(z) - 1)"),
        derivative=f"{SELU_SCALE}*" + _below_zero("1", f"{SELU_ALPHA}*exp(z)"),
    ),
    "elu": Activation(  # Clevert et al. 2015, alpha = 1
        phi=elu,
        slope=lambda z: torch.exp(z.clamp(max=0)),
        module=nn.ELU,
        kinks=(0.0,),
        formula=_below_zero("z", "exp(z) - 1"),
        derivative=_below_zero("1", "exp(z)"),
    ),
    "softplus": Activation(  # log(1 + e^z), Dugas et al. 2000; torch takes z from 20 on, which is off by 2e-9
        phi=partial(softplus, threshold=40),
        slope=torch.sigmoid,
        module=partial(nn.Softplus, threshold=40),
        formula="log(1 + exp(z))",
        derivative="1/(1 + exp(-z))",
    ),
    "mish": Activation(  # z tanh(softplus(z)), Misra 2019
        phi=mish,
        slope=mish_slope,
        module=nn.Mish,
        largest_slope=1.0884982,  # at z = 1.490571
        formula="z*tanh(log(1 + exp(z)))",
        derivative="tanh(log(1 + exp(z))) + z*(1 - tanh(log(1 + exp(z)))**2)/(1 + exp(-z))",
    ),
    "gelu_tanh": Activation(  # the approximation of gelu by tanh, Hendrycks & Gimpel 2016
        phi=partial(gelu, approximate="tanh"),
        slope=gelu_tanh_slope,
        module=partial(nn.GELU, approximate="tanh"),
        largest_slope=1.1289931,  # at z = 1.418504
        formula=f"z*(1 + tanh(sqrt(2/pi)*(z + {GELU_CUBIC}*z**3)))/2",
        derivative=f"(1 + tanh(sqrt(2/pi)*(z + {GELU_CUBIC}*z**3)))/2"
        f" + z*(1 - tanh(sqrt(2/pi)*(z + {GELU_CUBIC}*z**3))**2)*sqrt(2/pi)*(1 + {3 * GELU_CUBIC}*z**2)/2",
    ),
    "hardswish": Activation(  # z relu6(z + 3)/6, Howard et al. 2019
        phi=hardswish,
        slope=lambda z: hardswish_back(torch.ones_like(z), z),
        module=nn.Hardswish,
        kinks=(-3.0, 3.0),
        largest_slope=1.5,  # at z = 3
        backward=hardswish_back,
        formula="Piecewise((0, z < -3), (z, z > 3), (z*(z + 3)/6, True))",
        derivative="Piecewise((0, z < -3), (1, z > 3), (z/3 + 1/2, True))",
    ),
    "relu6": Activation(  # min(max(z, 0), 6), Krizhevsky 2010
        phi=relu6,
        slope=lambda z: ((z > 0) & (z < 6)).to(z.dtype),
        module=nn.ReLU6,
        kinks=(0.0, 6.0),
        backward=lambda grad, z: grad.masked_fill((z <= 0) | (z >= 6), 0),
        formula="Piecewise((0, z < 0), (6, z > 6), (z, True))",
        derivative="Piecewise((0, z < 0), (0, z > 6), (1, True))",
    ),
}
_FIXED = {id(row) for row in ACTIVATIONS.values()}
ACTIVATIONS["swish"] = ACTIVATIONS["silu"]  # its name in Ramachandran et al. 2017


TORCH_HAS = ("linear", "relu", "leaky_relu", "tanh", "sigmoid", "selu")


def torch_gain(row: Activation) -> float:
    """`torch.nn.init.calculate_gain`, for the functions that torch knows, a leaky ReLU of any slope among them.

    A function of the user's is one of them if its values are.
    """
    z = torch.linspace(-8, 8, 33, dtype=torch.float64, device="cpu")
    values = row.phi(z)
    below = torch.where(z < 0, -float(row.phi(-torch.ones(1, dtype=torch.float64))) * z, z)  # leaky, with this slope
    shapes = {name: ACTIVATIONS[name].phi(z) for name in TORCH_HAS} | {"leaky_relu": below}
    name = next((name for name, known in shapes.items() if torch.allclose(values, known, rtol=1e-9, atol=1e-12)), "")
    if not name:
        known = next((name for name, known in ACTIVATIONS.items() if known is row), "a custom function")
        raise UsageError(f"init.gain_kind=torch: torch has no gain for activation={known}; use chi, rms or std")
    slope = -float(row.phi(-torch.ones(1, dtype=torch.float64))) if name == "leaky_relu" else None
    return float(nn.init.calculate_gain(name, slope))  # type: ignore[arg-type]


def find_torch_gain(row: Activation) -> float | None:
    """The same; None where torch has none."""
    try:
        return gain(row, "torch")
    except UsageError:
        return None


def check_slope(row: Activation) -> None:
    """Refuse an activation whose phi'^2 has no mean: gradients, gains of kind chi and phases have no theory there."""
    if row.no_slope:
        raise UsageError(f"activation: {row.no_slope}; theory of gradients, of phases and gains of kind chi need phi'")


def chi_gain(row: Activation) -> float:
    """1 / sqrt(E[phi'(u)^2])."""
    check_slope(row)
    return _inverse_root(gaussian_mean(lambda z: row.slope(z).square(), row.kinks))


def std_gain(row: Activation) -> float:
    """1 / sqrt(Var[phi(u)])."""
    mean = gaussian_mean(row.phi, row.kinks)
    return _inverse_root(gaussian_mean(lambda z: (row.phi(z) - mean).square(), row.kinks))


def _inverse_root(moment: float) -> float:
    if not moment > 0:
        raise UsageError("activation: phi or its slope is 0 almost everywhere, so there is no gain of this kind")
    return 1 / math.sqrt(moment)


GAIN_KINDS: dict[str, Callable[[Activation], float]] = {
    # E[phi'(u)^2] gain^2 = 1: gradients keep their second moment (He et al. 2015, eq. 14)
    "chi": chi_gain,
    # E[phi(u)^2] gain^2 = 1: the next preactivation keeps its second moment
    "rms": lambda row: _inverse_root(gaussian_mean(lambda z: row.phi(z).square(), row.kinks)),
    "std": std_gain,  # Var[phi(u)] gain^2 = 1: activations scaled by the gain have unit variance
    "torch": torch_gain,
}


@lru_cache
def gain(activation: str | Activation, kind: str = "chi") -> float:
    """Gain (dimensionless) by which the weights of an activation are scaled; for ReLU sqrt(2) in all kinds but `std`.

    activation: a name of ACTIVATIONS, or a row. kind: a name of GAIN_KINDS, which says what the gain keeps where the
    preactivations are unit Gaussian. Errors: an unknown name or kind; torch's gain where torch has none.

    >>> round(gain("relu"), 12), round(gain("relu", "rms"), 12), round(gain("relu", "std"), 5)
    (1.414213562373, 1.414213562373, 1.71286)
    """
    row = choose(ACTIVATIONS, activation, "activation") if isinstance(activation, str) else activation
    return choose(GAIN_KINDS, kind, "init.gain_kind")(row)
