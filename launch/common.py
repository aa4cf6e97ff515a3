"""What the launch scripts share: Hydra under a launcher, one run directory, quiet libraries, exit codes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import logging
import math
import os
import pickle
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from apb_ds import __version__
from apb_ds.parallel.failure import ending
from apb_ds.parallel.failure.ending import FAILED_EXIT, PIPE_EXIT
from apb_ds.parallel.launcher import launched_rank as rank
from apb_ds.parallel.launcher import launched_world_size
from hydra_plugins import apb_ds_sweep

from . import arguments as command_line
from .early import check_early, put_geometry_in_force
from .errors import CONFIGS, describe
from .quiet import quiet_environment, quiet_imports

if TYPE_CHECKING:
    from apb_ds.session import Job

FIRST_RANK_GRACE_S = 10
SCRATCH_PREFIX = "apb_ds-"  # the process id follows, so that others can tell whether the process is alive


class Jobs:
    """The jobs of one command line, which run one after the other in the same processes.

    Attributes
    ----------
    watch : of this process; it follows the group that the jobs make
    """

    def __init__(self) -> None:
        self.has_failed = False
        self.watch = ending.Watch()

    def run(self, config: DictConfig) -> object:
        """Run one job; return what a sweeper that optimizes is to know.

        Reports the errors that users make; any exception that leaves it is a bug.
        """
        raise NotImplementedError

    def bad_job(self, job: Job, why: str) -> None:
        """Handle a job of a sweep whose config does not compose: unless overridden, end the sweep."""
        raise SystemExit(say_once(why))

    def abandon(self, why: str) -> None:
        """Save what can be saved when this rank ends early. Must send nothing: another rank may be gone."""

    def finish(self) -> bool:
        """Leave the process group after the last job; return whether all jobs succeeded."""
        leave_group()
        return not self.has_failed


class Trainings(Jobs):
    """Trainings, one a job.

    Parameters
    ----------
    train : callable
        Trains on every rank, and returns the record.
    summarise : callable
        Returns one line about a record: where the weights are, and how good.
    """

    def __init__(
        self, train: Callable[[Job, ending.Watch], dict[str, Any]], summarise: Callable[[dict[str, Any]], str]
    ) -> None:
        super().__init__()
        self._train = train
        self._summarise = summarise

    def run(self, config: DictConfig) -> None:
        from apb_ds.session.steps import JOB_ERRORS, JobError

        try:
            record = self._train(job_of(config), self.watch)
        except (JobError, *JOB_ERRORS) as error:
            if isinstance(error, JOB_ERRORS) and not isinstance(error, ValueError):
                raise  # perhaps on this rank only: it ends, and the launcher ends the others
            self.has_failed = True
            if rank() == 0:
                print(f"Error: {error}", file=sys.stderr, flush=True)
        else:
            if rank() == 0:
                print(self._summarise(record), flush=True)


def run_hydra(config_name: str, jobs: Jobs) -> int:
    """Run each job that the command line asks for, and return the exit code.

    Parameters
    ----------
    config_name : str
        A file in configs/, without its suffix.
    """
    if "--version" in sys.argv[1:]:  # Hydra would print its own
        if rank() == 0:
            print(f"apb_ds {__version__}", flush=True)
        return 0
    if any(flag in command_line.HELP for flag in sys.argv[1:]):
        return print_help(config_name)
    try:
        command_line.check_flags(sys.argv[1:])
    except ValueError as error:
        return say_once(str(error))
    with jobs.watch:
        return _run_hydra(config_name, jobs)


def print_help(config_name: str) -> int:
    """Print a command's settings, and return the exit code."""
    from .help import help_text

    try:
        text = help_text(config_name, command_line.for_hydra(sys.argv[1:]))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return say_once(describe(error))
    if rank() == 0:
        try:
            print(text, flush=True)
        except BrokenPipeError:  # `--help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return PIPE_EXIT
    return 0


def _run_hydra(config_name: str, jobs: Jobs) -> int:
    arguments = command_line.for_hydra(sys.argv[1:])
    debug = os.environ.get("HYDRA_FULL_ERROR") == "1" or "debug=true" in (item.lower() for item in arguments)
    if rank() > 0:
        scratch = _private_directory(jobs.watch)
        arguments = command_line.without_files(arguments, scratch)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
        logging.getLogger().setLevel(logging.ERROR)
    elif isinstance(sys.stdout, io.TextIOWrapper):
        # An answer that the terminal cannot encode must not fail the first rank alone.
        sys.stdout.reconfigure(errors="backslashreplace")
    if launched_world_size() > 1:
        random.seed(0)  # of Hydra's shuffle(...): all ranks must run the same jobs
    sys.argv = [sys.argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors, which are formatted here
    quiet_environment(debug)

    def bad_job(number: int, arguments: Sequence[str], directory: Path, error: Exception) -> None:
        from apb_ds.session import Job

        if debug and rank() == 0:
            traceback.print_exception(error)
        run_dir = directory if rank() == 0 else None
        jobs.bad_job(Job({}, run_dir, command_line.overrides_of(arguments), in_sweep=True), describe(error))

    def refuse(error: Exception) -> float:
        """End the run, or one job of a sweep, for its config."""
        runtime = HydraConfig.get()
        directory = Path(runtime.runtime.output_dir)
        if not OmegaConf.is_missing(runtime.job, "num"):
            bad_job(runtime.job.num, task_overrides(), directory, error)
            return math.nan
        if debug and rank() == 0:
            traceback.print_exception(error)
        with contextlib.suppress(OSError):
            directory.rmdir()  # nothing ran
        raise SystemExit(say_once(describe(error)))

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    def main(config: DictConfig) -> object:
        if rank() > 0 and OmegaConf.is_missing(HydraConfig.get().job, "num"):
            # Hydra creates it again; nothing is written there. A sweeper may write into it at its end.
            shutil.rmtree(scratch, ignore_errors=True)
        if OmegaConf.select(config, "model.device") == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed moves models to its accelerator
        try:
            put_geometry_in_force(config, task_overrides())
            if launched_world_size() == 1:  # ranks tell each other of errors, for which they meet first
                check_early(config)
        except (OmegaConfBaseException, ValueError) as error:
            return refuse(error)
        try:
            quiet_imports(debug)
            return jobs.run(config)
        except OmegaConfBaseException as error:  # interpolations are resolved when the job is made
            return refuse(error)
        except Exception as error:
            # Hydra would go on with the sweep's next job, but the ranks that did not fail would not.
            jobs.watch.give_up(error, jobs.abandon)

    Plugins.instance()  # executes the plugin modules again, once, which would reset what is set in them
    apb_ds_sweep.on_failure(bad_job)
    try:
        main()
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:  # not from a job: see main
        if debug and rank() == 0:
            traceback.print_exc()
        jobs.abandon(describe(error))  # of a sweep that has begun, which its sweeper ends
        return say_once(describe(error))
    except pickle.PicklingError:
        return say_once(
            "this launcher sends jobs to other processes, which cannot share this run's ranks, model and device: leave "
            "hydra/launcher at one_by_one, which loads the model once for all jobs, or start several commands."
        )
    except ending.Stopped as error:
        jobs.watch.give_up(error, jobs.abandon)
    except KeyboardInterrupt:
        jobs.watch.interrupt(jobs.abandon)
    try:
        succeeded = jobs.finish()
    except (Exception, ending.Stopped) as error:
        jobs.watch.give_up(error, jobs.abandon)
    return 0 if succeeded else _wait_for_first_rank()


def job_of(config: DictConfig) -> Job:
    """Return a composed config as a job; only the first rank's job has a directory.

    Raises
    ------
    OmegaConfBaseException
        If an interpolation cannot be resolved.
    """
    from apb_ds.session.job import Job

    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    runtime = HydraConfig.get()
    return Job(
        values={str(key): value for key, value in values.items()},
        run_dir=Path(runtime.runtime.output_dir) if rank() == 0 else None,
        overrides=command_line.overrides_of(task_overrides()),
        in_sweep=not OmegaConf.is_missing(runtime.job, "num"),
    )


def task_overrides() -> list[str]:
    """Return the job's overrides as they were given: an interpolation in a text is not resolved."""
    overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(overrides, list)
    return [str(override) for override in overrides]


def sweep_directory() -> Path | None:
    """Return the folder of the command line's sweep, if it is one that runs here."""
    return apb_ds_sweep.sweep_directory()


def swept_keys() -> set[str]:
    """Return the config paths to which the command line gives several values."""
    return command_line.swept_keys(sys.argv[1:])


def task_arguments() -> str:
    """Return the job's overrides, quoted for a shell."""
    return shlex.join(task_overrides())


def say_once(message: str) -> int:
    """Print an error that every rank has, on the first rank of each node, and return the exit code."""
    if rank() == 0:
        print(f"Error: {message}", file=sys.stderr, flush=True)
    elif os.environ.get("LOCAL_RANK") == "0":  # another node may have got another command line
        print(f"Error: rank {rank()}: {message}", file=sys.stderr, flush=True)
    return _wait_for_first_rank()


def leave_group() -> None:
    """Leave the process group, if a job has joined one."""
    if "torch" not in sys.modules:  # --help and tab completion import nothing heavy
        return
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _private_directory(watch: ending.Watch) -> Path:
    """Return a scratch directory, removed when the process ends; remove those of killed processes first."""
    for old in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*-*"):
        process = old.name.removeprefix(SCRATCH_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            is_ours = old.stat().st_uid == os.getuid()
            if is_ours and process.isdigit() and not Path(f"/proc/{process}").exists():
                shutil.rmtree(old, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    watch.add_cleanup(functools.partial(shutil.rmtree, directory, ignore_errors=True))
    return directory


def _wait_for_first_rank() -> int:
    """Return the exit code for failure, on other ranks only after the first one has had time to print its error.

    A launcher terminates all ranks with SIGTERM as soon as one exits with an error. A rank that gets it here exits
    with the same code as the first rank.
    """
    if rank() > 0:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED_EXIT))
        time.sleep(FIRST_RANK_GRACE_S)
    return FAILED_EXIT
