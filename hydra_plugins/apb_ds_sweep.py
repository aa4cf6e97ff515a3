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
from omegaconf.errors import OmegaConfBaseException

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

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Return the results of all jobs; not a number, for sweepers that optimize, of one that did not compose."""
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
        return returned


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
