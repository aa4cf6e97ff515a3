"""What all ranks do together: work in step, values from the first rank, failures that every rank learns of."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from apb_ds.parallel.groups import SequenceGroup

# What a job may fail with while the sweep goes on. Anything else is a bug, and ends the process.
JOB_ERRORS = (ValueError, RuntimeError, OSError, MemoryError)

Result = TypeVar("Result")


class JobError(Exception):
    """A job failed on at least one rank, and every rank knows."""


class Steps:
    """The steps of one job on the ranks of a group.

    Parameters
    ----------
    group : SequenceGroup
    debug : whether the first rank prints where an error came from
    """

    def __init__(self, group: SequenceGroup, *, debug: bool = False) -> None:
        self.group = group
        self.debug = debug

    def together(self, work: Callable[[], Result], *, local: bool = False) -> Result:
        """Do the work on every rank, then agree on whether it went well: one rank's failure is everybody's.

        Bad input (ValueError) is found before anything is sent. Whatever else fails on one of several ranks may leave
        the others inside a collective: then this rank ends, and the launcher ends the others.

        Parameters
        ----------
        work : callable
        local : whether the work sends nothing, so that any failure of it can be agreed on

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
            raise  # nobody reads the output: the end of the run, not of the job
        except JOB_ERRORS as error:
            if not (local or isinstance(error, ValueError) or self.group.world_size == 1):
                raise
            failure = self._failure(error)
        failures = self.group.gather_objects(failure)
        if any(failures):
            raise JobError(_first_failure(failures))
        return result  # type: ignore[return-value]

    def from_first(self, work: Callable[[], Result]) -> Result:
        """Do the work on the first rank alone, and return what it gave on every rank.

        Parameters
        ----------
        work : callable
            Sends nothing; its result is small and can be pickled. Tensors travel with `ids_from_first`.

        Raises
        ------
        JobError
            On every rank, if the work failed.
        """
        message: tuple[str | None, Result | None] | None = None
        if self.group.is_first:
            try:
                message = None, work()
            except BrokenPipeError:
                raise
            except JOB_ERRORS as error:
                message = self._failure(error), None
        message = self.group.gather_objects(message)[0]
        assert message is not None
        failure, result = message
        if failure is not None:
            raise JobError(failure)
        return result  # type: ignore[return-value]

    def ids_from_first(self, ids: Tensor | None, length: int, device: torch.device) -> Tensor:
        """Return the first rank's ids, (1, length), int64, on every rank's device."""
        if self.group.is_first:
            assert ids is not None
            return self.group.broadcast(ids.to(device).contiguous())
        return self.group.broadcast(torch.empty((1, length), dtype=torch.int64, device=device))

    def say_trace(self) -> None:
        """Print where the present error came from, if that was asked for."""
        if self.debug and self.group.is_first:
            traceback.print_exc()

    def _failure(self, error: Exception) -> str:
        self.say_trace()
        return str(error) or type(error).__name__


def _first_failure(failures: list[str | None]) -> str:
    """Return what to tell: the first rank's failure as it is, another's with the rank's number."""
    rank, failure = next((rank, failure) for rank, failure in enumerate(failures) if failure)
    return failure if rank == 0 else f"rank {rank}: {failure}"


def gather_numbers(group: SequenceGroup, **numbers: Any) -> dict[str, list[Any]]:
    """Return each of the numbers as a list over the ranks."""
    everyone = group.gather_objects(numbers)
    return {name: [rank[name] for rank in everyone] for name in numbers}
