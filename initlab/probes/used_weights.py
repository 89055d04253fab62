"""The rows of weights that a module has used in the place of a parameter.

Some are computed from parameters before each use, which then have the word `parameter`. Others are tensors that
`torch.func.functional_call`, or the user, has put where a parameter was. What was used has the row `weight` or `bias`:
its values, its gradient, and its update where it is computed.
"""

from collections.abc import Container, Iterable, Iterator
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn

from initlab.probes.computed_weights import ComputedWeight
from initlab.probes.gradient_hooks import GradientHooks
from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.probed_modules import ProbedModule, as_weight, measurable, name_parameter
from initlab.stats.keys import TensorKey

REPLACED = "replaced"  # in the column `op`: the call used another tensor than the module's parameter


class UsedWeights:
    """What the modules of one network use for weights, in the calls of one step."""

    def __init__(
        self,
        buffer: ProbeBuffer,
        stage: str,
        training: bool,
        gradients: GradientHooks,
    ) -> None:
        self._buffer, self._stage, self._training, self._gradients = buffer, stage, training, gradients
        self._sources: dict[int, tuple[ReferenceType[Tensor], int]] = {}  # of a tensor: the id of what it stands for
        self._computed: dict[int, Tensor] = {}  # by the id of its source
        self._before: dict[int, tuple[ProbedModule, ComputedWeight, int, Tensor]] = {}  # to make updates of
        self.replaced: set[int] = set()  # ids of parameters whose place another tensor took in this step

    def note(self, chain: nn.Module, weight: Any) -> None:
        """A weight was computed."""
        if isinstance(weight, Tensor):
            self._computed[id(chain)] = weight
            self._sources[id(weight)] = ref(weight), id(chain)

    def open(self, m: ProbedModule) -> None:
        """A call of a module begins, whose functions may use its weights."""
        for used, source, _, _ in self._list_used(m):
            self._sources[id(used)] = ref(used), source

    def _list_used(self, m: ProbedModule) -> Iterator[tuple[Tensor, int, str, str]]:
        """The tensors used in a call: each with the id of its source, its name and the column `op`."""
        for part, p in m.parameters:
            used = m.module._parameters.get(part, p)
            if used is not None and used is not p:
                self.replaced.add(id(p))
                yield used, id(p), part, REPLACED
        for c in m.computed:
            weight = self._computed.get(id(c.source)) if c.is_chain else vars(m.module).get(c.part)
            if isinstance(weight, Tensor):
                yield weight, id(c.source), c.part, c.op

    def find_source(self, x: Tensor) -> int:
        """The id of the parameter that a tensor is, is a view of, or stands for; 0 for any other tensor."""
        for one in (x, x._base):
            if isinstance(one, nn.Parameter):
                return id(one)
            seen = self._sources.get(id(one))
            if seen is not None and seen[0]() is one:
                return seen[1]
        return 0

    def measure(self, m: ProbedModule, call: int, layer: int, numbers: dict[int, int]) -> None:
        """The rows of what the call that ends has used: of this layer, or of that which a source has in `numbers`."""
        for used, source, part, op in self._list_used(m):
            if not measurable(used):
                continue
            word = name_parameter(m.module, part, used)
            key = self.put(m.name, call, numbers.get(source, layer), part, used, op, word)
            computed = next((c for c in m.computed if id(c.source) == source), None)
            if self._training and computed is not None and source not in self._before:
                update = self._buffer.code(key._replace(tensor="update"))
                self._before[source] = m, computed, update, used.detach().clone()
        for c in m.computed:
            self._computed.pop(id(c.source), None)

    def put(
        self, name: str, call: int, number: int, part: str, used: Tensor, op: str, word: str = "weight"
    ) -> TensorKey:
        """The rows of a tensor that was used for a weight, and of its gradient."""
        key = TensorKey(self._stage, "module", number, word, "forward", name, part, call, op)
        self._buffer.put(self._buffer.code(key), as_weight(used), batched=False)
        if used.requires_grad:
            gradient = self._buffer.code(key._replace(direction="backward"))
            self._buffer.scaled.add(gradient)
            self._gradients.watch(used, gradient, as_weight, batched=False)
        return key

    def measure_updates(self, held: Container[int]) -> None:
        """The changes of computed weights, where an optimizer has moved what they are computed from."""
        for source, (m, computed, code, before) in list(self._before.items()):
            if any(id(p) in held for _, p in m.parameters):
                del self._before[source]
                self._buffer.put(code, as_weight(computed.compute() - before), batched=False)

    def measure_rest(self, modules: Iterable[ProbedModule], numbers: dict[int, int]) -> None:
        """What functions of other modules have used, at the end of a pass."""
        for m in modules if self._computed else ():
            if m.chosen and any(id(c.source) in self._computed and id(c.source) in numbers for c in m.computed):
                m.ran = True
                self.measure(m, m.calls, 0, numbers)

    def end_step(self) -> None:
        """Forget the tensors of the step."""
        self._sources.clear()
        self._computed.clear()
        self._before.clear()
        self.replaced.clear()
