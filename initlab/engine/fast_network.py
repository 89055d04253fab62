"""The fast training of the hand-written network: the same rules as in mlp.py, in memory that is allocated once.

What makes it fast, and changes no gradient: layers of one shape are one stack, their updates one batched product; ReLU
and its mask overwrite what they read; the input gets no gradient; a step that is not recorded adds the gradient to the
weights without ever holding it; many rows go through in pieces that stay in the cache. A recorded step takes its
statistics in the passes over memory that it makes anyway (recorders.py).
Legend: E ensemble, N batch, I fan_in, O fan_out, L hidden layers; layer l is position l - 1 of every list.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from initlab.engine import mlp
from initlab.engine.layer_memory import LayerTensors, Product
from initlab.engine.mlp import Parameters
from initlab.engine.named_tensors import items_of, update_items
from initlab.errors import UsageError
from initlab.nn.activations import Activation
from initlab.nn.custom_activation import Given, as_activation
from initlab.nn.custom_loss import GivenLoss, as_loss
from initlab.nn.loss_table import Loss
from initlab.probes.probe import Sink

CACHE_BYTES = 2**20  # of a core's second cache: rows beyond it go through in pieces
FEWEST_ROWS = 1024  # a piece is never smaller: matrix products want them
KEPT_MEMORIES = 4  # batch sizes whose memory is kept
Factors = Sequence[tuple[float, float]]  # of every layer's learning rates, weights and biases; none: all are 1
JOINT_ENTRIES = 2**24  # products of more multiplications run one after the other, smaller ones as one batch

threshold_backward = torch.ops.aten.threshold_backward.grad_input


class StepMemory:
    """What a pass over n rows writes, for the hidden layers: activations `a` and their gradients dL/dz `g`.

    Preactivations `z` and dL/da `a_grad` have memory of their own if `separate`; else they are overwritten by `a`, `g`.
    """

    def __init__(self, net: "FastNetwork", rows: int, separate: bool) -> None:
        shapes, like = [(*net.lead, rows, width) for width in net.sizes[1:-1]], net.w[0]
        self.a, self.g = LayerTensors(shapes, like), LayerTensors(shapes, like)
        self.z, self.a_grad = (LayerTensors(shapes, like), LayerTensors(shapes, like)) if separate else (self.a, self.g)
        self.a_t = [a.mT for a in self.a.each]
        self.up = list(zip(net.w.each, net.b.each, self.z.each, self.a.each, strict=False))
        self.down = list(zip(net.w_t[1:], self.a_grad.each, self.g.each, self.a.each, self.z.each, strict=True))[::-1]
        self.updates, self.sums = self._products(net.w), self._products(net.w_grad)
        self.bias_sums, self.bias_parts = self._sums(net.b_grad), self._sums(net.b_part)

    def _sums(self, to: LayerTensors) -> list[tuple[Tensor | None, Tensor]]:
        """Gradients of a run of hidden layers and where their sums over the batch go; None: the loss's."""
        parts = [(run.start, min(run.stop, len(self.g))) for run in to.runs if run.start < len(self.g)]
        return [*((self.g.positions(*part), to.positions(*part)) for part in parts), (None, to[-1])]

    def _products(self, to: LayerTensors) -> list[Product]:
        """How dL/dW of a run of layers is added to `to`."""
        found = []
        for run, block in zip(to.runs, to.whole, strict=True):
            k = run.start
            grad = self.g[k] if k < len(self.g) else None
            if run.stop - run.start > 1:
                inputs, grads = self.a.positions(run.start - 1, run.stop - 1), self.g.positions(run.start, run.stop)
                found.append(Product(block.flatten(0, -3).baddbmm_, inputs.flatten(0, -3).mT, grads.flatten(0, -3)))
                continue
            across = not to[k].is_contiguous()
            target = to[k].mT if across else to[k]
            add = target.addmm_ if target.ndim == 2 else target.baddbmm_
            if k:
                found.append(Product(add, self.a_t[k - 1], grad))
            else:
                found.append(Product(add, grad if grad is None or not across else grad.mT, None, True, across))
        return found


class FastNetwork:
    """One network in matrices, or a few as one batched program; w (I, O) or (E, I, O), b (O,) or (E, 1, O).

    `factors` multiply the learning rate of each layer's weights and biases.
    """

    def __init__(
        self, parameters: Parameters, activation: Activation, loss: Loss, lr: float, factors: Factors = ()
    ) -> None:
        self.activation, self.loss = activation, loss
        self.in_place = activation.rectifies
        self.count = len(parameters[0][0])
        self.lead: tuple[int, ...] = () if self.count == 1 else (self.count,)
        self.sizes = [w.shape[-2] for w, _ in parameters] + [parameters[-1][0].shape[-1]]
        pairs, like = list(pairwise(self.sizes)), parameters[0][0]
        weights = [(*self.lead, i, o) for i, o in pairs]
        biases = [(*self.lead, 1, o) if self.lead else (o,) for _, o in pairs]
        by_layer = factors or [(1.0, 1.0)] * len(pairs)
        w_rates, b_rates = [lr * weight for weight, _ in by_layer], [lr * bias for _, bias in by_layer]
        self.w, self.w_grad = (LayerTensors(weights, like, inner=True, rates=w_rates) for _ in range(2))
        # The first layer's gradient lies as torch's does, (O, I): where I is large it is found faster that way.
        self.w_grad.each[0] = like.new_zeros(*self.lead, *pairs[0][::-1]).mT
        self.w_grad.whole[0] = self.w_grad.each[0].unsqueeze(0)
        self.b, self.b_grad, self.b_part = (LayerTensors(biases, like, rates=b_rates) for _ in range(3))
        self.w_rates, self.b_rates = self.w.run_rates, self.b.run_rates
        self.load(parameters)
        self.w_t = [w.mT for w in self.w.each]
        self.affine: Callable[..., Tensor] = torch.baddbmm if self.lead else torch.addmm
        self.product: Callable[..., Tensor] = torch.bmm if self.lead else torch.mm
        self.out = parameters[-1][0]  # of the last step, (N, O) or (E, N, O)
        self._memories: dict[tuple[int, bool], StepMemory] = {}

    def load(self, parameters: Parameters) -> None:
        """Take over values, [(w (E, I, O), b (E, O)), ...], or without E for a single network."""
        for k, (w, b) in enumerate(parameters):
            self.w[k].copy_(w.view_as(self.w[k]))
            self.b[k].copy_(b.view_as(self.b[k]))

    def memory(self, rows: int, separate: bool = False) -> StepMemory:
        """Memory for n rows, made once; a piece that is left over has its own."""
        key = (rows, separate or not self.in_place)
        if key not in self._memories:
            for old in list(self._memories)[: 1 - KEPT_MEMORIES]:
                del self._memories[old]
            self._memories[key] = StepMemory(self, *key)
        return self._memories[key]

    def forward(self, x: Tensor, s: StepMemory) -> Tensor:
        """The outputs; every hidden layer's activations stand in `s.a`."""
        inp = x
        for w, b, z, a in s.up:
            self.affine(b, inp, w, out=z)
            inp = z.relu_() if z is a else a.copy_(self.activation.phi(z))
        return self.affine(self.b[-1], inp, self.w[-1])

    def backward(self, g: Tensor, s: StepMemory) -> None:
        """From dL/dout the gradients of all preactivations, left in `s.g`."""
        for w_t, a_grad, z_grad, a, z in s.down:
            self.product(g, w_t, out=a_grad)
            if self.in_place:
                threshold_backward(a_grad, a, 0, grad_input=z_grad)
            else:
                z_grad.copy_(self.activation.pull_back(a_grad, z))
            g = z_grad

    def weight_gradients(self, x: Tensor, g: Tensor, s: StepMemory, keep: float = 0.0) -> None:
        """w_grad = keep * w_grad + dL/dW, a run of layers in one product."""
        for product in s.sums:
            product(x, g, beta=keep)

    def bias_gradients(self, g: Tensor, sums: list[tuple[Tensor | None, Tensor]]) -> None:
        """dL/db, sums over the batch, of all layers."""
        for grad, out in sums:
            torch.sum(g if grad is None else grad, -2, keepdim=bool(self.lead), out=out)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One update by gradient descent, no gradient of a weight ever held; the loss before it, () or (E,)."""
        s = self.memory(x.shape[-2])
        self.out = self.forward(x, s)
        value, g = self.loss.both(self.out, y)
        self.backward(g, s)
        self.bias_gradients(g, s.bias_sums)
        for product, rate in zip(s.updates, self.w_rates, strict=True):
            product(x, g, alpha=-rate)
        for block, grad, rate in zip(self.b.whole, self.b_grad.whole, self.b_rates, strict=True):
            block.sub_(grad, alpha=rate)
        return value

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss; `w_grad` and `b_grad` hold the gradients. Many rows go through in pieces that stay in the cache."""
        n, keep, total = x.shape[-2], 0.0, x.new_zeros(self.lead)
        rows = max(FEWEST_ROWS, CACHE_BYTES // (x.element_size() * (self.sizes[0] + 2 * sum(self.sizes[1:]))))
        for start in range(0, n, rows):
            part, targ = x[..., start : start + rows, :], y[..., start : start + rows]
            s, share = self.memory(part.shape[-2]), part.shape[-2] / n
            value, g = self.loss.both(self.forward(part, s), targ)
            if share < 1:
                g.mul_(share)
            self.backward(g, s)
            self.bias_gradients(g, s.bias_parts if keep else s.bias_sums)
            if keep:
                for block, more in zip(self.b_grad.whole, self.b_part.whole, strict=True):
                    block.add_(more)
            self.weight_gradients(part, g, s, keep=keep)
            total, keep = total + value * share, 1.0
        return total


class Engine:
    """An ensemble under gradient descent, an update a call: `parameters` is [(w (E, I, O), b (E, O)), ...], copied.

    Small networks run as one batched program, larger ones one after the other, each in its own memory: the products of
    `batch` rows decide. `lr` is one learning rate or one for each network; `factors`, given for each network, multiply
    those of its layers. A step that is recorded: recorders.py.
    """

    def __init__(
        self,
        parameters: Parameters,
        activation: Given = "relu",
        loss: GivenLoss = "cross_entropy",
        lr: float | Sequence[float] = 0.1,
        batch: int = 64,
        factors: Sequence[Factors] = (),
    ) -> None:
        row, objective = as_activation(activation), as_loss(loss, "loss")
        self.count = count = len(parameters[0][0])
        rates = [float(rate) for rate in lr] if isinstance(lr, Sequence) else [float(lr)] * count
        if len(rates) != count:
            raise UsageError(f"lr: {len(rates)} learning rates for {count} networks; give one, or one for each")
        own = [tuple(each) for each in factors] or [()] * count
        alike = len(set(zip(rates, own, strict=True))) == 1
        joint = alike and batch * max(w.shape[-1] * w.shape[-2] for w, _ in parameters) <= JOINT_ENTRIES
        self._sink: Sink | None = None
        self._steps = 0
        self.slices = [slice(0, count)] if joint else [slice(k, k + 1) for k in range(count)]
        self.networks = [
            FastNetwork([(w[part], b[part]) for w, b in parameters], row, objective, rates[part.start], own[part.start])
            for part in self.slices
        ]

    def load(self, parameters: Parameters) -> None:
        """Take over values, [(w (E, I, O), b (E, O)), ...], or without E for a single network."""
        for net, part in zip(self.networks, self.slices, strict=True):
            net.load(parameters if self.count == 1 else [(w[part], b[part]) for w, b in parameters])

    @property
    def parameters(self) -> Parameters:
        """[(w (E, I, O), b (E, O)), ...], copied."""
        layers = range(len(self.networks[0].w))
        shapes = [(i, o) for i, o in pairwise(self.networks[0].sizes)]
        return [
            (
                torch.cat([net.w[k].reshape(-1, *shapes[k]) for net in self.networks]),
                torch.cat([net.b[k].reshape(-1, shapes[k][1]) for net in self.networks]),
            )
            for k in layers
        ]

    @property
    def outputs(self) -> Tensor:
        """The outputs of the last step, (E, N, O)."""
        found = [net.out if net.lead else net.out.unsqueeze(0) for net in self.networks]
        return found[0] if len(found) == 1 else torch.cat(found)

    def parts(self, *batches: Tensor) -> Iterator[list[Tensor]]:
        """What each of `networks` gets of tensors (E, ...)."""
        for net, part in zip(self.networks, self.slices, strict=True):
            yield [t[part] if net.lead else t[part.start] for t in batches]

    def step(self, xb: Tensor, yb: Tensor) -> Tensor:
        """One update of every network; the losses before it, (E,). xb (E, N, I), yb (E, N)."""
        step, self._steps = self._steps, self._steps + 1
        if self._sink is None or not self._sink.due(step):
            return self._update(xb, yb)
        before, net = self.parameters, self.networks[0]
        seen = mlp.forward_and_backward(before, xb, yb, net.activation, net.loss)
        losses = self._update(xb, yb)
        updates = update_items("scratch", before, self.parameters)
        for key, values, saturated in [*items_of("scratch", seen, before, net.activation), *updates]:
            self._sink.put(key, values, saturated)
        self._sink.end(step)
        return losses

    def watch(self, sink: Sink | None) -> None:
        """Put the tensors of coming steps into the sink, as `initlab.probe(engine)` asks; None: no longer.

        A step that is due is made twice, once to be looked at: what is trained stays bit for bit what it was.
        Recording (recorders.py) is the fast way to the same rows.
        """
        self._sink = sink

    def _update(self, xb: Tensor, yb: Tensor) -> Tensor:
        if self.count == 1:
            return self.networks[0].step(xb[0], yb[0]).unsqueeze(0)
        return torch.cat([n.step(*part).reshape(-1) for n, part in zip(self.networks, self.parts(xb, yb), strict=True)])

    def gradients(self, xb: Tensor, yb: Tensor) -> tuple[Tensor, Parameters]:
        """The losses (E,) and [(dL/dw (E, I, O), dL/db (E, O)), ...]; no update."""
        pairs = zip(self.networks, self.parts(xb, yb), strict=True)
        losses = torch.cat([net.gradients(*part).reshape(-1) for net, part in pairs])
        found = []
        for k, (i, o) in enumerate(pairwise(self.networks[0].sizes)):
            w = [net.w_grad[k].reshape(-1, i, o) for net in self.networks]
            b = [net.b_grad[k].reshape(-1, o) for net in self.networks]
            found.append((torch.cat(w), torch.cat(b)) if len(w) > 1 else (w[0].clone(), b[0].clone()))
        return losses, found
