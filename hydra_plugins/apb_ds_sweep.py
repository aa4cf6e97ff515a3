"""A sweep that goes on when one job's config does not compose. Hydra finds plugins by the name of this folder.

Hydra's own sweeper composes all jobs first and rejects the whole sweep if one of them fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

FAILED = "the job failed; sweepers that optimize stop then, unless hydra.sweeper.max_failure_rate lets them go on."
Failure = Callable[[int, Sequence[str], Path, Exception], None]

_on_failure: Failure | None = None
_directory: Path | None = None


def on_failure(tell: Failure | None) -> None:
    """Set what is called for a job that does not compose, with its number, overrides, directory and error.

    Forgets the sweep before.
    """
    global _on_failure, _directory
    _on_failure, _directory = tell, None


def sweep_directory() -> Path | None:
    """Return the folder of the sweep that has run; None where none has."""
    return _directory


class OneByOneSweeper(BasicSweeper):
    """Leaves composing each job to the launcher."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Accept everything: the launcher checks each job."""


class OneByOneLauncher(BasicLauncher):
    """Runs jobs in this process, one after the other; reports and skips a job that does not compose."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Prepare for a sweep.

        Raises
        ------
        HydraException
            If the sweeper optimizes and has nothing to optimize, or would not ask all ranks for the same jobs.
        """
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self._optimizes = not config.hydra.sweeper._target_.endswith((".BasicSweeper", ".OneByOneSweeper"))
        if self._optimizes:
            _check_optimizer(config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Return the results of all jobs; of one that failed not a number, or an error if the sweeper optimizes."""
        global _directory
        assert self.config is not None
        directory = _directory = Path(str(self.config.hydra.sweep.dir)).absolute()
        returned: list[JobReturn] = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            try:
                returned += super().launch([overrides], number)
            except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: model=5
                if _on_failure is None:
                    raise
                _on_failure(number, overrides, directory / str(number), error)
                returned.append(JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=math.nan))
            if self._optimizes and _has_failed(returned[-1]):
                returned[-1].status, returned[-1]._return_value = JobStatus.FAILED, HydraException(FAILED)
        return returned


def _has_failed(job: JobReturn) -> bool:
    numbers = job.return_value if isinstance(job.return_value, (list, tuple)) else [job.return_value]
    return any(isinstance(number, float) and math.isnan(number) for number in numbers)


def _check_optimizer(config: DictConfig) -> None:
    """Raise HydraException if a sweeper that optimizes cannot do so here."""
    if config.get("objective") is None:
        raise HydraException(
            "this sweeper optimizes a number of each job's record: name it, as in objective=metrics.prefill_s."
        )
    from apb_ds.parallel.launcher import launched_world_size

    settings = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
    if launched_world_size() == 1:
        return
    if isinstance(settings, dict) and settings.get("storage") is not None:
        raise HydraException(
            "hydra.sweeper.storage is for a single process: every rank runs the sweeper, and would add its own trials."
        )
    if not _has_seed(settings):
        raise HydraException(
            "every rank runs the sweeper, and without a seed the ranks would ask for different jobs: set one, for "
            "Optuna hydra.sweeper.sampler.seed=0."
        )


def _has_seed(settings: object) -> bool:
    if not isinstance(settings, dict):
        return False
    return any(
        (str(name).endswith("seed") and value is not None) or _has_seed(value) for name, value in settings.items()
    )


_STORE = ConfigStore.instance()
# Plain mappings, not dataclasses, which look up their module in sys.modules: Hydra adds it there only after running it.
_STORE.store(
    group="hydra/sweeper",
    name="one_by_one",
    node={"_target_": f"{__name__}.{OneByOneSweeper.__name__}", "max_batch_size": None, "params": None},
    provider="apb_ds",
)
_STORE.store(
    group="hydra/launcher",
    name="one_by_one",
    node={"_target_": f"{__name__}.{OneByOneLauncher.__name__}"},
    provider="apb_ds",
)
