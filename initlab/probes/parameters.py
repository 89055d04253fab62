"""The parameters of a watched network as rows: values, gradients and updates, those of one shape measured together.

Knows nothing of steps: it is told when the values are those of the step and when the optimizer is done.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from initlab.probes.hooks import Hooks
from initlab.probes.probed_modules import MEASURED
from initlab.stats.buffer import Buffer, stacks
from initlab.stats.kernels.addresses import in_reach, jobs
from initlab.stats.kernels.cpu import JOB
from initlab.stats.keys import Spot


def matrix(x: Tensor, leading: int = 0) -> Tensor:
    """(..., O, rest) of a parameter of any shape behind `leading` dimensions; a bias (O,) is one row."""
    own = x.shape[leading:]
    return x.reshape(*x.shape[:leading], own[0] if len(own) > 1 else 1, -1)


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.layout == torch.strided else grad.to_dense()


class Parameters:
    """The chosen parameters, each once: a shared one goes by the name under which it is met first.

    With `updates` the weights before an update are kept in memory of their own.
    """

    def __init__(self, hooks: Hooks, buffer: Buffer, stage: str, updates: bool) -> None:
        self._hooks, self._buffer, self._with_updates = hooks, buffer, updates
        self._all: list[nn.Parameter] = []
        self._spots: list[Spot] = []
        seen: set[int] = set()
        for w in hooks.watched:
            if w.parameters:
                hooks.number(w)
            for part, p in w.parameters if w.chosen else []:
                if (
                    id(p) not in seen
                    and p.dtype in MEASURED
                    and p.numel()
                    and not isinstance(p, UninitializedParameter)
                ):
                    seen.add(id(p))
                    self._all.append(p)
                    tensor = "bias" if "bias" in part else "weight"
                    self._spots.append(Spot(stage, "module", w.number, tensor, "forward", w.name, part))
        kinds = [[k for k, spot in enumerate(self._spots) if spot.tensor == kind] for kind in ("weight", "bias")]
        self._gradient_spots = [spot._replace(direction="backward") for spot in self._spots]
        self._update_spots = [spot._replace(tensor="update") for spot in self._spots]
        self._together = [[kind[k] for k in group] for kind in kinds for group in stacks(self._all[k] for k in kind)]
        self._rooms: dict[tuple[int, str], Tensor] = {}  # memory that is used again at every step
        order = [place for places in self._together for place in places]
        self._addressed = _Addressed([self._all[k] for k in order], [self._spots[k] for k in order], buffer, updates)

    def values(self) -> None:
        """Rows of the values as they are."""
        if not self._addressed.values():
            self._stacked_values()

    @torch.no_grad()
    def _stacked_values(self) -> None:
        for k, places in enumerate(self._together):
            found = [self._all[place] for place in places]
            kept = self._with_updates and self._spots[places[0]].tensor == "weight"
            self._put(places, self._stack(k, found, "before" if kept else ""), self._spots)

    def updates(self) -> None:
        """Rows of W_{k+1} - W_k, for weights; W_k is what `values` has seen."""
        if not self._addressed.updates():
            self._stacked_updates()

    @torch.no_grad()
    def _stacked_updates(self) -> None:
        for k, places in enumerate(self._together):
            if (k, "before") in self._rooms:
                stacked = self._rooms[k, "before"]
                for place, old in zip(places, stacked.unbind(), strict=True):
                    torch.sub(self._all[place], old, out=old)
                self._put(places, stacked, self._update_spots)

    def gradients(self) -> None:
        """Rows of `.grad` as it stands; parameters without one have none."""
        if not self._addressed.gradients():
            self._stacked_gradients()

    @torch.no_grad()
    def _stacked_gradients(self) -> None:
        for k, places in enumerate(self._together):
            found = {place: _dense(g) for place in places if (g := self._all[place].grad) is not None}
            if found:
                room = "" if len(found) == len(places) else None
                self._put(list(found), self._stack(k, list(found.values()), room), self._gradient_spots)

    def _stack(self, group: int, found: Sequence[Tensor], use: str | None) -> Tensor:
        """(n, ...) of tensors of one shape, in the group's memory for that use; one that is only looked at stays."""
        if len(found) == 1 and not use:
            return found[0].unsqueeze(0)
        if use is None:
            return torch.stack(list(found))
        if (group, use) not in self._rooms:
            with torch.inference_mode(False):
                like = found[0]
                room = torch.empty((len(found), *like.shape), dtype=like.dtype, device=like.device)
            self._rooms[group, use] = room
        return torch.stack(list(found), out=self._rooms[group, use])

    def on_gradients(self) -> None:
        """Rows of the gradients that the coming backward pass finds, whatever `.grad` holds."""
        for p, spot in zip(self._all, self._gradient_spots, strict=True):
            if p.requires_grad:
                self._hooks.on_gradient(p, self._see(spot))

    def _see(self, spot: Spot) -> Callable[[Tensor], None]:
        def gradient(grad: Tensor) -> None:
            self._buffer.put(spot, matrix(_dense(grad.detach())))

        return gradient

    def _put(self, places: Sequence[int], stacked: Tensor, spots: list[Spot]) -> None:
        self._buffer.put_all([spots[place] for place in places], matrix(stacked, 1))


class _Addressed:
    """Parameters that the compiled pass reads where they lie, all in one call; it keeps the weights on its way."""

    def __init__(self, parameters: list[nn.Parameter], spots: list[Spot], buffer: Buffer, updates: bool) -> None:
        self._buffer, self._all, self._spots = buffer, parameters, spots
        self._keeping = False
        self._sizes = [p.numel() for p in parameters]
        self._kept: dict[int, Tensor] = {}
        self._weights = [k for k, spot in enumerate(spots) if updates and spot.tensor == "weight"]
        self._possible = bool(parameters) and all(map(in_reach, parameters))
        self._codes = [buffer.code(spot) for spot in spots]
        self._gradient_codes = [buffer.code(spot._replace(direction="backward")) for spot in spots]
        self._update_codes = [buffer.code(spots[k]._replace(tensor="update")) for k in self._weights]
        if self._possible:
            with torch.inference_mode(False):
                for k in self._weights:
                    self._kept[k] = torch.empty_like(parameters[k], requires_grad=False)
        self._value_jobs, self._gradient_jobs = jobs(parameters, self._kept), jobs(parameters, {})
        self._update_jobs = jobs([parameters[k] for k in self._weights], dict(enumerate(self._kept.values())))

    def values(self) -> bool:
        """Whether the values could be read, and the weights kept."""
        found = _addresses(self._all, self._sizes) if self._possible else None
        self._keeping = found is not None and self._buffer.take_jobs(self._value_jobs, found, self._codes)
        return self._keeping

    def updates(self) -> bool:
        """Whether the weights were kept; what their updates are is measured then."""
        if not self._keeping or not self._weights:
            return self._keeping
        found = _addresses([self._all[k] for k in self._weights], [self._sizes[k] for k in self._weights])
        if found is None or not self._buffer.take_jobs(self._update_jobs, found, self._update_codes, change=True):
            for k in self._weights:  # an optimizer that puts another kind of tensor in the parameter's place
                change = self._all[k].detach() - self._kept[k]
                self._buffer.put(self._spots[k]._replace(tensor="update"), matrix(change))
        return True

    def gradients(self) -> bool:
        """Whether the gradients could be read."""
        if not self._possible:
            return False
        grads = [p.grad for p in self._all]
        there = [k for k, grad in enumerate(grads) if grad is not None]
        found = _addresses([grad for grad in grads if grad is not None], [self._sizes[k] for k in there])
        if found is None:
            return False
        if len(there) == len(grads):
            return self._buffer.take_jobs(self._gradient_jobs, found, self._gradient_codes)
        some = self._gradient_jobs[there]
        some[:, JOB.index("first")] = range(len(there))
        return self._buffer.take_jobs(some, found, [self._gradient_codes[k] for k in there])


def _addresses(found: Sequence[Tensor], sizes: Sequence[int]) -> list[int] | None:
    """None where a tensor is not of its size or not in reach."""
    addresses = [
        x.data_ptr()
        for x, size in zip(found, sizes, strict=True)
        if x.layout is torch.strided and x.numel() == size and in_reach(x)
    ]
    return addresses if len(addresses) == len(found) else None
