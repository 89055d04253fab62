"""Numbers without a range: a float64 tensor with its power of two carried along.

A layer's linear map and its activation act on such a tensor as they do on plain numbers, whatever its magnitude, so
that a signal can be followed to 1e1000 or 1e-1000.
Legend: N batch, C units, I fan_in, O fan_out; leading dimensions (...) are networks, each with a power of its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from initlab.nn.activations import Activation

# Beyond 2^(+-_FAR) every activation of the table is what it is at infinity and at 0: a slope for each sign, or bounded.
_FAR = 500


class Scaled(NamedTuple):
    """mantissa * 2^exponent: float64 (..., N, C) with a largest magnitude near 1 unless it is 0, and (...).

    Any mantissa is right; one near 1 keeps products and squares inside float64, and every linear map sees to it.
    """

    mantissa: Tensor
    exponent: Tensor


def rescale(x: Tensor, exponent: Tensor | float = 0.0) -> Scaled:
    """x * 2^exponent with the largest magnitude of each network moved into its exponent, into [1/2, 1); exact.

    Float64 tensors beyond 2^(+-1000) are moved by 2^1000 only, since 2^1074 is no float64: into [2^-74, 2^24).
    """
    wide = x.double()
    peak = wide.abs().amax((-2, -1))
    shift = torch.where(peak.isfinite(), torch.frexp(peak).exponent, 0).clamp(-1000, 1000).double()
    return Scaled(times_power(wide, -shift), shift + exponent)


def times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """x * 2^exponent, x (..., N, C) and exponent (...)."""
    return torch.ldexp(x, exponent[..., None, None])


def to_float64(z: Scaled) -> Tensor:
    """z in float64 with magnitudes moved into 2^-500..2^500, signs and zeros kept."""
    near = times_power(z.mantissa, z.exponent.clamp(-600, 600))
    moved = torch.copysign(near.abs().clamp(2.0**-_FAR, 2.0**_FAR), near)
    return torch.where(near == 0, near, moved)


def join(a: Scaled, b: Scaled) -> Scaled:
    """The networks of a and those of b, in this order."""
    return Scaled(torch.cat([a.mantissa, b.mantissa]), torch.cat([a.exponent, b.exponent]))


class Unbounded:
    """The arithmetic of a pass (`network.Arithmetic`) on such numbers; weights and biases are of any number format."""

    def linear(self, x: Scaled, w: Tensor, b: Tensor | None = None) -> Scaled:
        """x w + b; w (..., I, O), b (..., O)."""
        product = rescale(x.mantissa @ w.double(), x.exponent)
        return product if b is None else self.add(product, rescale(b.unsqueeze(-2)))

    def linear_back(self, g: Scaled, w: Tensor) -> Scaled:
        return self.linear(g, w.mT)

    def add(self, a: Scaled, b: Scaled) -> Scaled:
        """a + b. Of the smaller one, what lies below the last digit of the larger is lost, as in any sum."""
        low = torch.full_like(a.exponent, -torch.inf)
        exponents = [torch.where((x.mantissa == 0).all(-1).all(-1), low, x.exponent) for x in (a, b)]
        top = torch.maximum(*exponents)
        top = torch.where(top.isfinite(), top, 0)
        first, second = (times_power(x.mantissa, (x.exponent - top).clamp(-2000, 0)) for x in (a, b))
        return rescale(first + second, top)

    def activate(self, z: Scaled, row: Activation) -> Scaled:
        """phi(z) = z phi(s) / s with s = z moved into float64: where s is not z, phi(z) / z no longer depends on |z|.

        An activation that is not 0 at 0 is read off s itself, but where it grows with z. One that is bounded and 0 at
        0, as tanh, is right up to |z| = 2^500.
        """
        if row.homogeneous:
            return Scaled(row.phi(z.mantissa), z.exponent)
        near = to_float64(z)
        value = row.phi(near)
        ratio = torch.where(near == 0, 0, z.mantissa * (value / near))
        if row.phi(torch.zeros((), dtype=torch.float64)) == 0:
            return rescale(ratio, z.exponent)
        grows = value.abs() > 2.0 ** (_FAR - 100)
        if not bool(grows.any()):
            return rescale(value)
        return self.add(rescale(torch.where(grows, ratio, 0), z.exponent), rescale(torch.where(grows, 0, value)))

    def activate_back(self, g: Scaled, z: Scaled, row: Activation) -> Scaled:
        """g phi'(z), by the activation's own rule."""
        if row.homogeneous:
            return Scaled(row.pull_back(g.mantissa, z.mantissa), g.exponent)
        return rescale(row.pull_back(g.mantissa, to_float64(z)), g.exponent)


UNBOUNDED = Unbounded()


def log2_moments(x: Scaled) -> Tensor:
    """log2 of the rms and of the pooled std over the last two dimensions, (2, ...); -inf where they are 0."""
    wide, sides = x.mantissa, (-2, -1)
    mean = wide.mean(sides, keepdim=True)
    # A rounded mean may leave the range of the entries; inside it equal entries have a variance of exactly 0.
    mean = mean.clamp(wide.amin(sides, keepdim=True), wide.amax(sides, keepdim=True))
    variance, second = (wide - mean).square().mean(sides), wide.square().mean(sides)
    return torch.stack([second, variance]).log2() / 2 + x.exponent
