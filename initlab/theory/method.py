"""How a stack is predicted: by closed laws where they can be trusted, else by simulated networks if affordable."""

import numpy as np
import torch

from initlab.errors import check, choose
from initlab.meanfield.maps import growth, moment
from initlab.nn.activations import ACTIVATIONS
from initlab.theory.batch_law import ln
from initlab.theory.request import Request
from initlab.theory.stack_laws import enter_layers, finite_laws, tensor_kinds

METHODS = {
    "auto": "closed laws where they hold, simulation elsewhere if it costs seconds; `method` says what was done",
    "closed": "exact laws where there are some, else the lognormal closure",
    "simulation": "networks drawn from the exact law of the stack",
}
SPREAD = 1.0  # sum of 1/width up to which `auto` trusts the closure where phi is homogeneous
SPREAD_WITH_SCALE = 0.6  # the same where phi has a scale of its own
WANDERS = 0.3  # standard deviation of ln q over networks up to which an activation with a scale is trusted too
SURE = 3  # standard deviations between a fitted layer's variance and the tolerance that decides what becomes of it
BUDGET = 3e10  # multiplications in float64 that `auto` spends on a simulation: below 10 s
FLOAT32_IS_FASTER = 3  # times, measured
NETWORKS = (100, 1000)  # fewest and most networks of a simulation that chooses for itself


def choose_method(request: Request, method: str, networks: int | None) -> tuple[str, int]:
    """The column `method` of closed laws and 0, or "simulation" and the number of networks to draw.

    method: a name of METHODS. networks: how many to simulate; None chooses. Raises UsageError for another name, or
    fewer than 2 networks.
    """
    choose(METHODS, method, "method")
    [networks] = check(networks=networks)
    doubtful = method != "simulation" and not is_trusted(request)
    if method == "simulation" or (method == "auto" and doubtful and _affordable_networks(request)):
        return "simulation", networks or _affordable_networks(request) or NETWORKS[0]
    return "log-delta, outside its range" if doubtful else "log-delta", 0


def _affordable_networks(request: Request) -> int:
    """How many networks the budget allows; 0 if they are too few to be of use or the chain does not know the input."""
    cost = sum(  # multiplications of one network, forward and backward, statistics included
        request.batch * (layer.fan_in + layer.fan_out) * (20 + 2 * min(layer.fan_in, 2 * request.batch))
        for layer in request.layers
    )
    networks = int(min(NETWORKS[1], BUDGET * (FLOAT32_IS_FASTER if fits_float32(request) else 1) / cost))
    return networks if networks >= NETWORKS[0] and not request.fixed_input else 0


def fits_float32(request: Request) -> bool:
    """Whether all signals stay well inside float32, six standard deviations included, and the inputs stay different."""
    for kind in tensor_kinds(request, finite_laws(request)):
        ln_q, spread = kind.law.ln_second_moment().T
        differ = kind.limit.single_input or bool((kind.limit.within_share > 1e-3).all())
        if not differ or not bool((np.abs(ln_q) / 2 + 3 * spread < 60).all()):
            return False
    return True


def is_trusted(request: Request) -> bool:
    """Whether the closure holds: more width than depth, and no second moment wandering over phi's curved parts."""
    if request.batch == 1 and request.row in (ACTIVATIONS["linear"], ACTIVATIONS["relu"]):
        return True
    if not _fits_are_decided(request):
        return False
    at = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    scale_free = bool((2 * growth(request.row, at) * at / moment(request.row, at) - 2).abs().max() < 1e-9)
    if sum(1 / layer.fan_out for layer in request.layers) > (SPREAD if scale_free else SPREAD_WITH_SCALE):
        return False
    return scale_free or bool((finite_laws(request).activations.ln_second_moment()[:, 1] < WANDERS).all())


def _fits_are_decided(request: Request) -> bool:
    """Whether nearly all networks agree on which layers a fit (LSUV) leaves alone; with biases the answer is no."""
    fitted = [layer.fitted for layer in request.layers]
    if not any(fitted):
        return True
    stack = finite_laws(request)
    entering = enter_layers(stack.input.ln_second_moment(), stack.activations.ln_second_moment())
    for fit, layer, (ln_q, sd) in zip(fitted, request.layers, entering, strict=True):
        if fit is None or layer.bias + layer.uniform_bias:
            return fit is None
        low, high = (ln(fit.drawn * layer.fan_in) + ln_q + k * SURE * sd for k in (-1, 1))
        edges = ln(1 - fit.tolerance), ln(1 + fit.tolerance)
        if any(low <= edge <= high for edge in edges):
            return False
    return True
