"""The numbers of layers: what has weights, in the order in which it is first called."""

from typing import NamedTuple

from initlab.probes.probed_modules import ProbedModule


class Site(NamedTuple):
    """What stays the same from step to step of an output of a module."""

    axis: int  # which dimension counts units
    code: int  # numbers of the keys of its rows, and of those of its gradient
    gradient_code: int


class LayerNumbers:
    """Numbers are given once and stay; functions have them by the weights that they use."""

    def __init__(self) -> None:
        self._last = 0
        self.of_weights: dict[int, int] = {}  # id of what a weight comes from -> the layer

    def number(self, m: ProbedModule) -> int:
        """The layer of a module with parameters; one that was never called comes after those that were."""
        if m.within is not None and not m.ran:
            return self.number(m.within)
        if not m.number:
            m.number = self._next()
        return m.number

    def number_function(self, m: ProbedModule, source: int) -> int:
        """The layer of a function with a weight of this source: that of its module, or a further one for a further
        weight; 0 stands for no weight of the network's own."""
        if m.is_layer and (not source or m.first_weight in (0, source)):
            m.first_weight = source
            return self.number(m)
        found = self.of_weights.get(source) or self._next()
        if source:
            self.of_weights[source] = found
        return found

    def _next(self) -> int:
        self._last += 1
        return self._last
