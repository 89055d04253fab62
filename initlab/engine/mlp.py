"""The MLP by hand, for one network or an ensemble at once, and its `nn.Module` twin.

The lines are the course's (`scratch/`), with leading ensemble dimensions: inp (..., N, I), out (..., N, O).
`parameters` is `[(w, b), ...]`, first layer first, w (..., I, O) and b (..., O); the last layer has no activation.
Layer l of the tables is `parameters[l - 1]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from initlab.nn.activations import Activation
from initlab.nn.loss_table import Loss

Parameters = list[tuple[Tensor, Tensor]]


def lin(inp: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """out = inp w + b; for a single network in one call, the same that `nn.Linear` makes, so that both round alike."""
    return torch.addmm(b, inp, w) if inp.ndim == 2 else inp @ w + b.unsqueeze(-2)


def lin_param_grads(g: Tensor, inp: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dw = inp^T g and dL/db = sum of g over the batch."""
    return inp.mT @ g, g.sum(-2)


def lin_inp_grad(g: Tensor, w: Tensor) -> Tensor:
    """dL/dinp = g w^T; the first layer never needs it."""
    return g @ w.mT


@dataclass
class Pass:
    """One forward and backward pass: position l - 1 of a list belongs to layer l."""

    preactivations: list[Tensor]
    activations: list[Tensor]  # one fewer: the last layer has none
    loss: Tensor
    preactivation_grads: list[Tensor]
    activation_grads: list[Tensor]
    parameter_grads: Parameters

    @property
    def out(self) -> Tensor:
        return self.preactivations[-1]


def forward(parameters: Parameters, inp: Tensor, activation: Activation) -> tuple[list[Tensor], list[Tensor]]:
    """Preactivations and activations of every layer."""
    preactivations = [lin(inp, *parameters[0])]
    activations = []
    for w, b in parameters[1:]:
        activations.append(activation.phi(preactivations[-1]))
        preactivations.append(lin(activations[-1], w, b))
    return preactivations, activations


def forward_and_backward(parameters: Parameters, xb: Tensor, yb: Tensor, activation: Activation, loss: Loss) -> Pass:
    """The whole pass by hand, for one network or an ensemble; the input gets no gradient, nobody needs it."""
    z, a = forward(parameters, xb, activation)
    return Pass(z, a, loss.forward(z[-1], yb), *backward(parameters, xb, yb, z, a, activation, loss))


def backward(
    parameters: Parameters,
    xb: Tensor,
    yb: Tensor,
    z: Sequence[Tensor],
    a: Sequence[Tensor],
    activation: Activation,
    loss: Loss,
) -> tuple[list[Tensor], list[Tensor], Parameters]:
    """Gradients of preactivations `z`, of activations `a`, and of the parameters, by hand from a forward pass."""
    z_grads: list[Tensor] = [loss.grad(z[-1], yb)]
    a_grads: list[Tensor] = []
    for (w, _), z_below in zip(parameters[:0:-1], z[-2::-1], strict=True):
        a_grads.append(lin_inp_grad(z_grads[-1], w))
        z_grads.append(activation.pull_back(a_grads[-1], z_below))
    z_grads, a_grads = z_grads[::-1], a_grads[::-1]
    return z_grads, a_grads, [lin_param_grads(g, inp) for g, inp in zip(z_grads, [xb, *a], strict=True)]


def twin(parameters: Parameters, member: int, activation: Activation) -> nn.Sequential:
    """The same network as torch writes it, with a copy of the weights of one member of the ensemble."""
    layers: list[nn.Module] = []
    for w, b in parameters:
        linear = nn.Linear(w.shape[-2], w.shape[-1], device="meta")  # draws nothing
        linear.weight = nn.Parameter(w[member].mT.clone(memory_format=torch.contiguous_format))
        linear.bias = nn.Parameter(b[member].clone())
        layers += [linear, activation.module()]
    return nn.Sequential(*layers[:-1])


def twin_parameters(twins: Sequence[nn.Sequential]) -> Parameters:
    """The parameters of the twins as one ensemble, in the layout of the hand-written network (a copy)."""
    members = [arrange_pairs([p.detach() for p in model.parameters()]) for model in twins]
    return [
        (torch.stack([w for w, _ in same]), torch.stack([b for _, b in same])) for same in zip(*members, strict=True)
    ]


def arrange_pairs(own: Sequence[Tensor]) -> Parameters:
    """Weights and biases of a module, w, b, w, b, ..., or their gradients, as [(w (I, O), b (O,)), ...]; views.

    On torch's memory, w being a view of torch's (O, I), every forward product by hand is the very call that `nn.Linear`
    makes: both passes have the same preactivations to the last bit, and what is left to compare is the backward.
    """
    return [(weight.mT, bias) for weight, bias in zip(own[0::2], own[1::2], strict=True)]


def twin_pass(model: nn.Sequential, own: Sequence[nn.Parameter], xb: Tensor, yb: Tensor, loss: Loss) -> Pass:
    """A twin's forward pass and autograd's backward pass, with all tensors; `.grad` of its parameters is filled."""
    seen = [xb]
    with torch.enable_grad():
        for layer in model:
            seen.append(layer(seen[-1]))
        value = loss.module(seen[-1], yb)
    values = [t.detach() for t in seen[1:]]
    found = torch.autograd.grad(value, [*seen[1:], *own])
    grads, parameter_grads = found[: len(values)], found[len(values) :]
    for p, grad in zip(own, parameter_grads, strict=True):
        p.grad = grad
    lists = (values[0::2], values[1::2], value.detach(), list(grads[0::2]), list(grads[1::2]))
    return Pass(*lists, arrange_pairs(parameter_grads))


def run_twins(twins: Sequence[nn.Sequential], xb: Tensor, yb: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Losses (E,) and outputs (E, N, O) of the twins one by one; autograd fills `.grad` of the parameters."""
    outputs = [model(x) for model, x in zip(twins, xb, strict=True)]
    losses = torch.stack([loss.module(out, y) for out, y in zip(outputs, yb, strict=True)])
    losses.sum().backward()  # type: ignore[no-untyped-call]
    return losses.detach(), torch.stack([out.detach() for out in outputs])


class Together:
    """The twins as one program, `torch.func.vmap` of autograd: for steps whose tensors nobody looks at.

    Their parameters become views of one stack, so that both ways of running them see the same weights. Batched kernels
    may round otherwise than `nn.Linear` alone does.
    """

    def __init__(self, twins: Sequence[nn.Sequential], loss: Loss) -> None:
        self.twins = twins
        stacked, _ = torch.func.stack_module_state(list(twins))
        self.stacked = {name: p.detach() for name, p in stacked.items()}
        for member, model in enumerate(twins):
            for name, p in model.named_parameters():
                p.data = self.stacked[name][member]
        base = twins[0]

        def loss_and_out(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            out = torch.func.functional_call(base, parameters, (x,))
            return loss.module(out, y), out

        self._pass = torch.func.vmap(torch.func.grad_and_value(loss_and_out, has_aux=True))

    def forward_and_backward(self, xb: Tensor, yb: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (E,) and outputs (E, N, O); every parameter of the twins has its `.grad`."""
        grads, (losses, out) = self._pass(self.stacked, xb, yb)
        for member, model in enumerate(self.twins):
            for name, p in model.named_parameters():
                p.grad = grads[name][member]
        return losses.detach(), out.detach()
