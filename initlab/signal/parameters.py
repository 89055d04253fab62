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
    return grad.detach() if grad.layout == torch.strided else grad.detach().to_dense()


def _kind(x: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return x.shape, x.dtype, x.device


class Parameters:
    """The chosen parameters, each once: a shared one goes by the name under which it is met first."""

    def __init__(self, hooks: Hooks, buffer: Buffer, stage: str) -> None:
        self._hooks, self._buffer = hooks, buffer
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
        # Memory that is used at every step: where the weights before an update stand, and what passes through.
        self._before = [self._room(places) for places in self._together]
        self._passing = {_kind(room): torch.empty_like(room) for room in self._before}

    def _room(self, places: list[int]) -> Tensor:
        like = self._all[places[0]]
        with torch.inference_mode(False):
            return torch.empty((len(places), *like.shape), dtype=like.dtype, device=like.device)

    @torch.no_grad()
    def values(self) -> None:
        """Rows of the values as they are, which are kept for `updates`."""
        for places, room in zip(self._together, self._before, strict=True):
            self._put(places, torch.stack([self._all[place] for place in places], out=room), self._spots)

    @torch.no_grad()
    def updates(self) -> None:
        """Rows of W_{k+1} - W_k, for weights."""
        for places, old in zip(self._together, self._before, strict=True):
            if self._spots[places[0]].tensor == "weight":
                new = torch.stack([self._all[place] for place in places], out=self._passing[_kind(old)])
                self._put(places, new.sub_(old), self._update_spots)

    @torch.no_grad()
    def gradients(self) -> None:
        """Rows of `.grad` as it stands; parameters without one have none."""
        for places, before in zip(self._together, self._before, strict=True):
            found = [(place, g) for place in places if (g := self._all[place].grad) is not None]
            if found:
                room = self._passing[_kind(before)] if len(found) == len(places) else None
                stacked = torch.stack([_dense(g) for _, g in found], out=room)
                self._put([place for place, _ in found], stacked, self._gradient_spots)

    def on_gradients(self) -> None:
        """Rows of the gradients that the coming backward pass finds, whatever `.grad` holds."""
        for p, spot in zip(self._all, self._gradient_spots, strict=True):
            if p.requires_grad:
                self._hooks.on_gradient(p, self._see(spot))

    def _see(self, spot: Spot) -> Callable[[Tensor], None]:
        def gradient(grad: Tensor) -> None:
            self._buffer.put(spot, matrix(_dense(grad)))

        return gradient

    def _put(self, places: Sequence[int], stacked: Tensor, spots: list[Spot]) -> None:
        self._buffer.put_all([spots[place] for place in places], matrix(stacked, 1))
