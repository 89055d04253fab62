"""The thread that calls a watched model: rows of several at once could not be told apart."""

from threading import Lock, get_ident

from initlab.errors import UsageError
from initlab.probes.torch_private import is_differentiating


class OneThread:
    """A step belongs to the thread that calls the model first; autograd's own threads belong to the pass."""

    def __init__(self) -> None:
        self._thread, self._lock = 0, Lock()

    def is_foreign(self) -> bool:
        """Whether another thread than this has called the model in this step."""
        return self._thread not in (0, get_ident()) and not is_differentiating()

    def check(self) -> None:
        """Refuse a call by a second thread."""
        with self._lock:
            foreign = self.is_foreign()
            self._thread = self._thread or get_ident()
        if foreign:
            raise UsageError(
                "probe: several threads call the model at once (nn.DataParallel does so); watch a model on one device, "
                "or DistributedDataParallel"
            )

    def end_step(self) -> None:
        """The next step may belong to another thread."""
        self._thread = 0
