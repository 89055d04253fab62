"""The table of activations: phi, its derivative written by hand, its torch module and the gains that it needs.

Knows nothing of layers or weights. `u` is standard normal throughout; gains assume a preactivation of unit variance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, leaky_relu, selu, silu

from initlab.errors import UsageError, choose
from initlab.stats.quadrature import gaussian_mean

SLOPE = 0.01  # of leaky_relu below zero, as in torch
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

    def pull_back(self, grad: Tensor, z: Tensor) -> Tensor:
        """dL/dz from dL/dphi: grad * phi'(z), or the row's own rule where 0 * inf must be 0 as in autograd."""
        return grad * self.slope(z) if self.backward is None else self.backward(grad, z)


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z * math.sqrt(0.5))


def _normal_pdf(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _sigmoid_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


def _silu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _selu_slope(z: Tensor) -> Tensor:
    return SELU_SCALE * torch.where(z > 0, 1.0, SELU_ALPHA * torch.exp(z.clamp(max=0)))


ACTIVATIONS: dict[str, Activation] = {
    "linear": Activation(
        phi=lambda z: z,
        slope=torch.ones_like,
        module=nn.Identity,
        backward=lambda grad, z: grad,
        homogeneous=True,
    ),
    "relu": Activation(
        phi=torch.relu,
        slope=lambda z: (z > 0).to(z.dtype),
        module=nn.ReLU,
        kinks=(0.0,),
        backward=lambda grad, z: grad.masked_fill(z <= 0, 0),
        homogeneous=True,
    ),
    "leaky_relu": Activation(
        phi=partial(leaky_relu, negative_slope=SLOPE),
        slope=lambda z: torch.where(z > 0, torch.ones_like(z), SLOPE),
        module=partial(nn.LeakyReLU, SLOPE),
        kinks=(0.0,),
        backward=lambda grad, z: torch.where(z > 0, grad, SLOPE * grad),
        homogeneous=True,
    ),
    "tanh": Activation(
        phi=torch.tanh,
        slope=lambda z: 1 - torch.tanh(z).square(),
        module=nn.Tanh,
    ),
    "sigmoid": Activation(
        phi=torch.sigmoid,
        slope=_sigmoid_slope,
        module=nn.Sigmoid,
        largest_slope=0.25,
    ),
    "gelu": Activation(  # z Phi(z), Hendrycks & Gimpel 2016; exact, not the tanh approximation
        phi=gelu,
        slope=lambda z: _normal_cdf(z) + z * _normal_pdf(z),
        module=nn.GELU,
        largest_slope=1.1289043,  # at z = sqrt(2)
    ),
    "silu": Activation(  # z sigmoid(z), Elfwing et al. 2017
        phi=silu,
        slope=_silu_slope,
        module=nn.SiLU,
        largest_slope=1.0998393,  # at z = 2.3993573
    ),
    "selu": Activation(  # Klambauer et al. 2017
        phi=selu,
        slope=_selu_slope,
        module=nn.SELU,
        kinks=(0.0,),
        largest_slope=SELU_SCALE * SELU_ALPHA,
    ),
}


def _torch_gain(row: Activation) -> float:
    """`torch.nn.init.calculate_gain`, under torch's own names; it has none for gelu, silu and a user's function."""
    name = next((name for name, known in ACTIVATIONS.items() if known is row), "a function of one's own")
    if name not in TORCH_HAS:
        raise UsageError(f"init.gain_kind=torch: torch has no gain for activation={name}; use chi, rms or std")
    return float(nn.init.calculate_gain(name, SLOPE if name == "leaky_relu" else None))  # type: ignore[arg-type]


def _rms_gain(row: Activation) -> float:
    return _inverse_root(gaussian_mean(lambda z: row.phi(z).square(), row.kinks))


def _std_gain(row: Activation) -> float:
    mean = gaussian_mean(row.phi, row.kinks)
    return _inverse_root(gaussian_mean(lambda z: (row.phi(z) - mean).square(), row.kinks))


def _chi_gain(row: Activation) -> float:
    return _inverse_root(gaussian_mean(lambda z: row.slope(z).square(), row.kinks))


def _inverse_root(moment: float) -> float:
    if not moment > 0:
        raise UsageError("activation: phi or its slope is 0 almost everywhere, so there is no gain of this kind")
    return 1 / math.sqrt(moment)


TORCH_HAS = ("linear", "relu", "leaky_relu", "tanh", "sigmoid", "selu")
GAIN_KINDS: dict[str, Callable[[Activation], float]] = {
    "chi": _chi_gain,  # E[phi'(u)^2] gain^2 = 1: gradients keep their second moment (He et al. 2015, eq. 14)
    "rms": _rms_gain,  # E[phi(u)^2] gain^2 = 1: the next preactivation keeps its second moment
    "std": _std_gain,  # Var[phi(u)] gain^2 = 1: activations scaled by the gain have unit variance
    "torch": _torch_gain,
}


@lru_cache
def gain(activation: str | Activation, kind: str = "chi") -> float:
    """Gain (dimensionless) by which the weights of an activation are scaled; for ReLU sqrt(2) in all kinds but `std`.

    >>> round(gain("relu"), 12), round(gain("relu", "rms"), 12), round(gain("relu", "std"), 5)
    (1.414213562373, 1.414213562373, 1.71286)
    """
    row = choose(ACTIVATIONS, activation, "activation") if isinstance(activation, str) else activation
    return choose(GAIN_KINDS, kind, "init.gain_kind")(row)
