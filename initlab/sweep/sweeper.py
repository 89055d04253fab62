"""Hydra's sweeper of initlab: from the options of a sweep to its jobs, and from what became of them to a fault.

It is Hydra's basic sweeper, with three differences: a sweep that was stopped can be finished, all jobs run before a
fault of one is raised, and nothing is written before every job is known to compose.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper as HydraSweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from initlab.errors import UsageError
from initlab.job.life_cycle import outcome
from initlab.sweep import workers
from initlab.sweep.callback import OURS, Sweep
from initlab.sweep.hydra_private import MODULE, register
from initlab.terminal import Bar

log = logging.getLogger("initlab")


@dataclass
class SweeperConfig:
    """The fields of Hydra's basic sweeper."""

    _target_: str = f"{MODULE}.Sweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


class Sweeper(HydraSweeper):
    """`hydra/sweeper=basic` of initlab."""

    __module__ = MODULE

    def __init__(self, max_batch_size: int | None, params: Mapping[str, Any] | None = None) -> None:
        self.max_batch_size, self.params = max_batch_size, params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        folder = config.get("resume")
        if folder is not None:
            quoted = str(folder).replace("'", "\\'")
            with open_dict(config):
                OmegaConf.set_readonly(config.hydra, False)
                config.hydra.sweep.dir = str(folder)
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")  # the jobs are composed from these
        self.kind = str(config.hydra.runtime.choices.get("hydra/launcher"))
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Run the jobs; returns the JobReturns of the launcher, a batch each. Raises the first fault, at the end."""
        from initlab.runs import recorder
        from initlab.runs.parts import compact_left
        from initlab.sweep import resume  # and with it pandas, which a run needs later, if at all

        assert self.config is not None and self.launcher is not None and self.hydra_context is not None
        folder = Path(str(self.config.hydra.sweep.dir))
        loader = self.hydra_context.config_loader
        jobs = resume.expand(arguments, self.params, loader)
        resumed = self.config.get("resume") is not None
        if resumed:
            resume.refuse_no_sweep(folder)
        elif (folder / "multirun.yaml").exists():
            raise UsageError(f"{folder}: holds a sweep already; choose another hydra.sweep.dir, or say resume={folder}")
        Sweep.lock(folder)
        try:
            left = (
                resume.find_left(folder, self.config, jobs, loader)
                if resumed
                else resume.Left(jobs, range(len(jobs)), 0)
            )
            legal = getattr(self.launcher, "validate_batch_is_legal", self.validate_batch_is_legal)
            legal(Bar(left.jobs, desc="options", unit="job", disable=None))
        except BaseException:  # one that stops the program, too
            if not resumed:
                recorder.discard(folder)
            raise
        Sweep.begin(folder, len(left.jobs))
        recorder.write_text(folder / "multirun.yaml", OmegaConf.to_yaml(self.config))
        if resumed:
            for run in resume.find_jobs(folder):
                if run.done and (run.folder / "parts").is_dir():
                    compact_left(run.folder)
            log.info(f"resuming {folder}: {left.kept} jobs are done and kept, {len(left.jobs)} are left")
            outcome.notes.extend(filter(None, [resume.describe_other_code(folder)]))
        returns = []
        with workers.environment(self.config, self.kind):
            for start, stop in self._batches(left.numbers):
                returns.append(self.launcher.launch(left.jobs[start:stop], initial_job_idx=left.numbers[start]))
        _raise_first(one for batch in returns for one in batch)
        return returns

    def _batches(self, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
        """From where to where the launcher gets jobs at once: its k-th job gets the number of the first one plus k."""
        assert self.config is not None
        size = self.max_batch_size
        if size is None:
            size = workers.most_at_once(self.kind, int(self.config.threads))
        if size is not None and size < 1:
            raise UsageError(f"hydra.sweeper.max_batch_size={size}: must be at least 1")
        start = 0
        for stop in range(1, len(numbers) + 1):
            if stop == len(numbers) or numbers[stop] != numbers[stop - 1] + 1 or stop - start == size:
                yield start, stop
                start = stop


def _raise_first(returns: Iterator[JobReturn]) -> None:
    """Mistakes that jobs hand back are kept for the end; the first fault is raised when all of them have been seen."""
    fault: Any = None
    for one in returns:
        if one.status == JobStatus.FAILED:
            fault = fault or one
        elif isinstance(one.return_value, str):
            outcome.mistakes.append(str(one.return_value))
    if fault is not None:
        _ = fault.return_value


def install() -> None:
    """Let `hydra/sweeper=basic`, Hydra's default, be this one."""
    register(Sweeper, "hydra/sweeper", OURS, SweeperConfig())
