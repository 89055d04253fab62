"""What surrounds the jobs of a sweep: where its folder is, and a progress bar over its jobs."""

import math
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from tqdm import tqdm


class Sweep(Callback):
    """Hydra's callback: remembers the sweep's folder for what comes after the last job."""

    folder: ClassVar[Path | None] = None
    _bar: ClassVar[Any] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        Sweep.folder = Path(config.hydra.sweep.dir).absolute()
        Sweep._bar = tqdm(total=_jobs(config), desc="sweep", unit="job", disable=None)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if Sweep._bar is not None:
            Sweep._bar.update()

    @classmethod
    def close(cls) -> Path | None:
        """End the bar; the folder of the sweep, if there was one."""
        folder, cls.folder = cls.folder, None
        if cls._bar is not None:
            cls._bar.close()
            cls._bar = None
        return folder


def _jobs(config: DictConfig) -> int | None:
    """How many jobs the overrides make; None where Hydra alone can tell."""
    parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    swept = [override for override in parsed if override.is_sweep_override()]
    if any(not (override.is_choice_sweep() or override.is_range_sweep()) for override in swept):
        return None
    return math.prod(len(list(override.sweep_string_iterator())) for override in swept)
