"""Networks followed beyond the range of their number format: log2 of the rms and the std that are truly there.

What a network computes inside the range of its dtype is the truth, rounding included. Where it leaves that range a twin
goes on from the same numbers with the same weights, in float64 with a power of two carried; the network itself is not
touched. A network that left its range in the forward pass gets all its gradients from the twin: they need phi'(z) of
every layer, and a z that rounding has moved over a kink would change them.
Legend: E ensemble, N batch, O units.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from initlab.nn.activations import ACTIVATIONS
from initlab.nn.network import backward, forward
from initlab.nn.unbounded import UNBOUNDED, Scaled, join, log2_moments, rescale
from initlab.stats.summarize import derive
from initlab.tasks.ensemble.networks import Networks

# Subnormal numbers lose tiny * eps / 2 each; at an rms of 16 tiny that is a sixteenth of what rounding loses anyway.
GUARD = 16


def read_off(fields: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of rows (F, ...): log2 of rms and std (2, ...) of what the dtype holds, and whether that is the truth, (...).

    It is inside the range of the dtype: where all entries are finite and their rms is at least 16 tiny.
    """
    statistics = derive(fields, ("rms", "std", "n_nan", "n_inf"))
    rms, _, n_nan, n_inf = statistics
    return statistics[:2].log2(), (n_nan + n_inf == 0) & (rms >= GUARD * torch.finfo(dtype).tiny)


class UnboundedTwin:
    """The networks of a chunk that have left their number format, in arithmetic that has no range."""

    def __init__(self, nets: Networks) -> None:
        self._nets, self._network = nets, nets.net.network
        self._who: list[int] = []
        self._state: Scaled | None = None
        self._passed: dict[int, Scaled] = {}

    def forward(self, layers: Sequence[int], start: Tensor, true: Tensor, inside: Tensor) -> None:
        """Correct `true` (2, 2 len(layers), E), rows preactivation and activation of every layer, where not `inside`.

        `start` (E, N, I) is what entered the first of the layers; `inside` says in the order of travel up to where
        each network never left its format.
        """

        def correct(layer: int, z: Scaled, a: Scaled) -> None:
            self._correct(2 * layers.index(layer), true, inside, left, z, a)

        x = self._join(start, inside)
        left = self._find_left(inside)
        self._state = forward(self._network, self._weights, x, correct, UNBOUNDED, layers)

    def turn(self) -> Tensor:
        """Before the backward pass: who starts it inside (E,), and the preactivations of who does not.

        These are computed again from the input on and kept, in float32 where the dtype is no wider. The gradients of
        a linear stack do not depend on its signal.
        """
        nets = self._nets
        if nets.net.activation is ACTIVATIONS["linear"]:
            self._who = []
        inside = torch.ones(len(nets), dtype=torch.bool, device=nets.where.device)
        inside[self._who] = False
        self._state = None
        if self._who:
            kept = torch.float64 if nets.where.dtype == torch.float64 else torch.float32

            def keep(layer: int, z: Scaled, a: Scaled) -> None:
                self._passed[layer] = Scaled(z.mantissa.to(kept), z.exponent)

            x = rescale(nets.gaussian(nets.net.inputs, "input")[self._who])
            forward(self._network, self._weights, x, keep, UNBOUNDED)
            self._state = rescale(nets.gaussian(nets.net.sizes[-1], "gradient")[self._who])
        return inside

    def backward(
        self, layers: Sequence[int], start: Tensor, true: Tensor, inside: Tensor, passed: Sequence[Tensor]
    ) -> None:
        """The same for the gradients with respect to activation and preactivation, layers descending.

        A further row of `true` and `inside` is the gradient by the input.
        `start` (E, N, O) is the gradient that reached the first of the layers, `passed` the dtype's own
        preactivations (E, N, O) of all layers.
        """

        def preactivation(layer: int) -> Scaled:  # who left on the way up stands first, who leaves on the way down last
            before = self._passed.get(layer)
            if before is None:
                return rescale(passed[layer - 1][self._who])
            wide = Scaled(before.mantissa.double(), before.exponent)
            late = self._who[len(before.exponent) :]
            return join(wide, rescale(passed[layer - 1][late])) if late else wide

        def correct(layer: int, dz: Scaled, g: Scaled) -> None:
            self._correct(2 * layers.index(layer), true, inside, left, g, dz)

        g = self._join(start, inside)
        left = self._find_left(inside)
        below = true.shape[1] > 2 * len(layers)
        self._state = backward(self._network, self._weights, preactivation, g, correct, UNBOUNDED, layers, below)
        if below:
            self._correct(2 * len(layers), true, inside, left, self._state)

    def _weights(self, layer: int) -> tuple[Tensor, Tensor | None]:
        return self._nets.weights(layer, self._who)

    def _join(self, start: Tensor, inside: Tensor) -> Scaled:
        """The state of all who are outside at the end; who was inside so far begins with the dtype's own numbers."""
        new = [k for k in torch.nonzero(~inside[-1]).flatten().tolist() if k not in self._who]
        self._who += new
        if self._state is None:
            return rescale(start[new])
        return join(self._state, rescale(start[new])) if new else self._state

    def _find_left(self, inside: Tensor) -> int:
        """The first row before which all networks are inside: what the twins say of earlier ones nobody asks."""
        return int(inside[:, self._who].all(1).cumprod(0).sum())

    def _correct(self, row: int, true: Tensor, inside: Tensor, left: int, *values: Scaled) -> None:
        for k, value in enumerate(values, start=row):
            if k < left:
                continue
            true[:, k, self._who] = torch.where(inside[k, self._who], true[:, k, self._who], log2_moments(value))
