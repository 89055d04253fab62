"""The parameters of a watched network as rows: values, gradients and updates, those of one shape measured together.

Knows nothing of steps: it is told when the values are those of the step and when the optimizer is done.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from initlab.signal.buffer import Buffer, stacks
from initlab.signal.hooks import FORMATS, Hooks
from initlab.signal.tidy import Spot


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
                if id(p) not in seen and p.dtype in FORMATS and p.numel() and not isinstance(p, UninitializedParameter):
                    seen.add(id(p))
                    self._all.append(p)
                    tensor = "bias" if "bias" in part else "weight"
                    self._spots.append(Spot(stage, "module", w.number, tensor, "forward", w.name, part))
        kinds = [[k for k, spot in enumerate(self._spots) if spot.tensor == kind] for kind in ("weight", "bias")]
        self._gradient_spots = [spot._replace(direction="backward") for spot in self._spots]
        self._update_spots = [spot._replace(tensor="update") for spot in self._spots]
        self._together = [[kind[k] for k in group] for kind in kinds for group in stacks(self._all[k] for k in kind)]
        self._rooms: dict[tuple[int, str], Tensor] = {}  # memory that is used again at every step

    @torch.no_grad()
    def values(self) -> None:
        """Rows of the values as they are."""
        for k, places in enumerate(self._together):
            found = [self._all[place] for place in places]
            kept = self._with_updates and self._spots[places[0]].tensor == "weight"
            self._put(places, self._stack(k, found, "before" if kept else ""), self._spots)

    @torch.no_grad()
    def updates(self) -> None:
        """Rows of W_{k+1} - W_k, for weights; W_k is what `values` has seen."""
        for k, places in enumerate(self._together):
            if (k, "before") in self._rooms:
                stacked = self._rooms[k, "before"]
                for place, old in zip(places, stacked.unbind(), strict=True):
                    torch.sub(self._all[place], old, out=old)
                self._put(places, stacked, self._update_spots)

    @torch.no_grad()
    def gradients(self) -> None:
        """Rows of `.grad` as it stands; parameters without one have none."""
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
