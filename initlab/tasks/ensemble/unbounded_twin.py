"""Networks followed beyond the range of their number format: log2 of the rms and the std that are truly there.

What a network computes inside the range of its dtype is the truth, rounding included. Where it leaves that range a
companion goes on from the same numbers with the same weights, in float64 with a power of two carried; the network
itself is not touched. Who left on the way up has gradients from the companion alone: it needs phi'(z) of every layer,
and a z that rounding has moved over a kink would change them. Knows nothing of frames.
Legend: E ensemble, N batch, O units.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from initlab.nn import unbounded
from initlab.nn.activations import ACTIVATIONS, Activation
from initlab.nn.unbounded import Scaled, log2_moments, scaled
from initlab.stats.summarize import derive
from initlab.tasks.ensemble.networks import Networks

NUMBERS = ("log2_rms_true", "log2_std_true")
# Subnormal numbers lose tiny * eps / 2 each; at an rms of 16 tiny that is a sixteenth of what rounding loses anyway.
GUARD = 16


def read_off(fields: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of rows (F, ...): log2 of rms and std (2, ...) of what the dtype holds, and whether that is the truth, (...).

    It is inside the range of the dtype: where all entries are finite and their rms is at least 16 tiny.
    """
    statistics = derive(fields, ("rms", "std", "n_nan", "n_inf"))
    rms, _, n_nan, n_inf = statistics
    return statistics[:2].log2(), (n_nan + n_inf == 0) & (rms >= GUARD * torch.finfo(dtype).tiny)


class Companion:
    """The networks of a chunk that have left their number format, in arithmetic that has no range."""

    def __init__(self, nets: Networks, phi: Activation) -> None:
        self._nets, self._phi = nets, phi
        self._who: list[int] = []
        self._state: Scaled | None = None
        self._passed: dict[int, Scaled] = {}

    def forward(self, layers: Sequence[int], start: Tensor, true: Tensor, inside: Tensor) -> None:
        """Correct `true` (2, 2 len(layers), E), rows preactivation and activation of every layer, where not `inside`.

        `start` (E, N, I) is what entered the first of the layers; `inside` says in the order of travel up to where
        each network never left its format.
        """
        x = self._join(start, inside)
        for k, layer in enumerate(layers):
            z = self._lin(layer, x)
            x = unbounded.act(z, self._phi)
            self._correct(2 * k, true, inside, z, x)
        self._state = x

    def turn(self) -> Tensor:
        """Before the backward pass: who starts it inside (E,), and the preactivations of who does not.

        These are computed again from the input on and kept, in float32 where the dtype is no wider. The gradients of
        a linear stack do not depend on its signal.
        """
        if self._phi is ACTIVATIONS["linear"]:
            self._who = []
        inside = torch.ones(len(self._nets), dtype=torch.bool, device=self._nets.device)
        inside[self._who] = False
        self._state = None
        if self._who:
            kept = torch.float64 if self._nets.dtype == torch.float64 else torch.float32
            x = scaled(self._nets.gaussian(self._nets.shape.inputs, "input")[self._who])
            for layer in range(1, self._nets.shape.depth + 1):
                z = self._lin(layer, x)
                self._passed[layer] = Scaled(z.mantissa.to(kept), z.exponent)
                x = unbounded.act(z, self._phi)
            self._state = scaled(self._nets.gaussian(self._nets.shape.width, "gradient")[self._who])
        return inside

    def backward(
        self, layers: Sequence[int], start: Tensor, true: Tensor, inside: Tensor, passed: Callable[[int], Tensor]
    ) -> None:
        """The same for the gradients with respect to activation and preactivation, layers descending.

        `start` (E, N, O) is the gradient that reached the first of the layers, `passed(layer)` (E, N, O) the dtype's
        own preactivations.
        """
        g = self._join(start, inside)
        for k, layer in enumerate(layers):
            dz = unbounded.pull_back(g, self._preactivation(layer, passed(layer)), self._phi)
            self._correct(2 * k, true, inside, g, dz)
            if layer > 1:
                g = unbounded.lin(dz, self._nets.weights(layer, self._who)[0].mT)
        self._state = g

    def _lin(self, layer: int, x: Scaled) -> Scaled:
        return unbounded.lin(x, *self._nets.weights(layer, self._who))

    def _join(self, start: Tensor, inside: Tensor) -> Scaled:
        """The state of all who are outside at the end; who was inside so far begins with the dtype's own numbers."""
        new = [k for k in torch.nonzero(~inside[-1]).flatten().tolist() if k not in self._who]
        self._who += new
        if self._state is None:
            return scaled(start[new])
        return _joined(self._state, scaled(start[new])) if new else self._state

    def _preactivation(self, layer: int, passed: Tensor) -> Scaled:
        """Who left on the way up stands first, who leaves on the way down after them."""
        before = self._passed.get(layer)
        if before is None:
            return scaled(passed[self._who])
        wide = Scaled(before.mantissa.double(), before.exponent)
        late = self._who[len(before.exponent) :]
        return _joined(wide, scaled(passed[late])) if late else wide

    def _correct(self, row: int, true: Tensor, inside: Tensor, *values: Scaled) -> None:
        for k, value in enumerate(values, start=row):
            true[:, k, self._who] = torch.where(inside[k, self._who], true[:, k, self._who], log2_moments(value))


def _joined(a: Scaled, b: Scaled) -> Scaled:
    return Scaled(torch.cat([a.mantissa, b.mantissa]), torch.cat([a.exponent, b.exponent]))
