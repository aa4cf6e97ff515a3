"""What all ranks do together: work in step, values from the first rank, failures reported to every rank."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from apb_ds.config import name_keys
from apb_ds.parallel.groups import SequenceGroup

# Errors that fail a job but not the sweep. Anything else is a bug, and ends the process.
JOB_ERRORS = (ValueError, RuntimeError, OSError, MemoryError)

Result = TypeVar("Result")


class JobError(Exception):
    """A job failed on at least one rank, and every rank knows."""


class Steps:
    """The steps of one job on the ranks of a group.

    Parameters
    ----------
    group : SequenceGroup
    debug : whether the first rank prints an error's traceback
    """

    def __init__(self, group: SequenceGroup, *, debug: bool = False) -> None:
        self.group = group
        self.debug = debug

    def together(self, work: Callable[[], Result], *, local: bool = False) -> Result:
        """Do the work on every rank, then exchange whether it succeeded: if one rank fails, all do.

        Bad input (ValueError) is found before anything is sent. Any other error on one of several ranks may leave the
        others inside a collective: then this rank ends, and the launcher ends the others.

        Parameters
        ----------
        work : callable
        local : whether the work sends nothing, so that ranks can exchange any failure

        Raises
        ------
        JobError
            On every rank.
        """
        result: Result | None = None
        failure: str | None = None
        try:
            result = work()
        except BrokenPipeError:
            raise  # nobody reads the output: ends the process, not only the job
        except JOB_ERRORS as error:
            if not (local or isinstance(error, ValueError) or self.group.world_size == 1):
                raise
            failure = self._failure(error)
        failures = self.group.gather_objects(failure)
        if any(failures):
            raise JobError(_first_failure(failures))
        return result  # type: ignore[return-value]

    def from_first(self, work: Callable[[], Result]) -> Result:
        """Do the work on the first rank only, and return its result on every rank.

        Parameters
        ----------
        work : callable
            Sends nothing; its result is small and can be pickled. Send tensors with `ids_from_first`.

        Raises
        ------
        JobError
            On every rank, if the work failed.
        """
        failure: str | None = None
        result: Result | None = None
        if self.group.is_first:
            try:
                result = work()
            except BrokenPipeError:
                raise
            except JOB_ERRORS as error:
                failure = self._failure(error)
        failure, result = self.group.gather_objects((failure, result))[0]
        if failure is not None:
            raise JobError(failure)
        return result

    def ids_from_first(self, ids: Tensor | None, length: int, device: torch.device) -> Tensor:
        """Return the first rank's ids, (1, length), int64, on every rank's device."""
        if ids is None:
            ids = torch.empty((1, length), dtype=torch.int64)
        return self.group.broadcast(ids.to(device).contiguous())

    def print_trace(self) -> None:
        """Print the current error's traceback on the first rank if `debug` is set."""
        if self.debug and self.group.is_first:
            traceback.print_exc()

    def _failure(self, error: Exception) -> str:
        self.print_trace()
        return name_keys(str(error)) or type(error).__name__


def _first_failure(failures: list[str | None]) -> str:
    """Return the first failure, with the rank's number unless it is the first rank's."""
    rank, failure = next((rank, failure) for rank, failure in enumerate(failures) if failure)
    return failure if rank == 0 else f"rank {rank}: {failure}"


def gather_numbers(group: SequenceGroup, **numbers: Any) -> dict[str, list[Any]]:
    """Return each number as a list over the ranks."""
    everyone = group.gather_objects(numbers)
    return {name: [rank[name] for rank in everyone] for name in numbers}
