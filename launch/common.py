"""What the launch scripts share: Hydra under a launcher, one run directory, quiet libraries, exit codes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
sys.path.insert(0, str(ROOT))


import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.core.plugins import Plugins  # noqa: E402
from hydra.errors import HydraException, MissingConfigException  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException  # noqa: E402

from apb_ds.config import suggest  # noqa: E402
from apb_ds.parallel.failure import ending  # noqa: E402
from apb_ds.parallel.failure.ending import FAILED_EXIT, INTERRUPTED_EXIT, rank  # noqa: E402
from hydra_plugins import apb_ds_sweep  # noqa: E402

if TYPE_CHECKING:
    from apb_ds.session import Job

FIRST_RANK_GRACE_S = 10
SCRATCH_PREFIX = "apb_ds-"  # then the process, as others can then tell whether it lives
QUOTING_HINT = (
    "A text with commas, colons, equals signs, quotes or brackets wants quotes of its own inside the shell's: "
    "'task.query=\"Who, and when?\"'; or put it into a file: task.query=@question.txt."
)
INTERPOLATION_HINT = "A text with ${ in it is written with \\${, or put into a file: task.query=@question.txt."

Task = Callable[[DictConfig], None]
BadJob = Callable[["Job", str], None]


def run_hydra(
    config_name: str,
    task: Task,
    finish: Callable[[], bool],
    bad_job: BadJob | None = None,
    abandon: ending.Abandon | None = None,
) -> int:
    """Run `task` once for each job that the command line asks for, and return the exit code.

    Parameters
    ----------
    config_name : str
        A file in configs/, without its ending.
    task : callable
        Takes the composed config of one job. Expected failures are its own business; what it raises is a bug.
    finish : callable
        Called after the last job; returns whether all went well.
    bad_job : callable, optional
        Called as ``bad_job(job, why)`` for a job of a sweep whose config cannot be composed. Without it such a job
        ends the sweep.
    abandon : callable, optional
        Called as ``abandon(why)`` when this rank ends before its jobs do, to keep what can be kept. It must send
        nothing: another rank may be gone.
    """
    with ending.Watch() as watch:
        return _run_hydra(config_name, task, finish, bad_job, ending.GivingUp(watch, abandon))


def _run_hydra(
    config_name: str, task: Task, finish: Callable[[], bool], bad_job: BadJob | None, giving_up: ending.GivingUp
) -> int:
    arguments = _in_order([argument for argument in sys.argv[1:] if not _is_local_rank(argument)])
    debug = os.environ.get("HYDRA_FULL_ERROR") == "1" or "debug=true" in (item.lower() for item in arguments)
    if rank() > 0:
        scratch = _private_directory()
        arguments = _without_traces(arguments, scratch)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as the process lives)
        logging.getLogger().setLevel(logging.ERROR)
    elif isinstance(sys.stdout, io.TextIOWrapper):
        # What a model says must not fail, on the first rank alone, for a terminal that cannot show it.
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.argv = [sys.argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on; they are formatted here, once
    _quiet_environment(debug)

    tell = None if bad_job is None else _telling(bad_job, debug)

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    def main(config: DictConfig) -> None:
        if rank() > 0:
            shutil.rmtree(scratch, ignore_errors=True)  # Hydra has made it; nothing is written there
        if OmegaConf.select(config, "model.device") == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed moves models to its accelerator
        try:
            quiet_imports()
            task(config)
        except OmegaConfBaseException as error:  # values are resolved when a job is made of them
            runtime = HydraConfig.get()
            if tell is None or OmegaConf.is_missing(runtime.job, "num"):
                raise SystemExit(_say_once(describe(error))) from None
            tell(runtime.job.num, runtime.overrides.task, Path(runtime.runtime.output_dir), error)
        except Exception as error:
            # Hydra would go on with the next job of a sweep, without the ranks that did not fail.
            giving_up.on(error)

    Plugins.instance()  # runs the modules of plugins anew, once; what is set in them before that is lost
    apb_ds_sweep.on_failure(tell)
    try:
        main()
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:  # a job's own have ended above
        if debug and rank() == 0:
            traceback.print_exc()
        return _say_once(describe(error))
    except ending.Stopped as error:
        giving_up.on(error)
    except KeyboardInterrupt:
        if rank() == 0:
            print("Interrupted.", file=sys.stderr, flush=True)
        ending.leave(INTERRUPTED_EXIT)
    try:
        went_well = finish()
    except (Exception, ending.Stopped) as error:
        giving_up.on(error)
    return 0 if went_well else _wait_for_first_rank()


def job_of(config: DictConfig) -> Job:
    """Return a composed config as a job, which has a directory on the first rank.

    Raises
    ------
    OmegaConfBaseException
        For an interpolation that leads nowhere.
    """
    from apb_ds.session.job import Job

    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    runtime = HydraConfig.get()
    return Job(
        values={str(key): value for key, value in values.items()},
        run_dir=Path(runtime.runtime.output_dir) if rank() == 0 else None,
        overrides=overrides_of(runtime.overrides.task),
        in_sweep=not OmegaConf.is_missing(runtime.job, "num"),
    )


def task_arguments() -> str:
    """Return the job's arguments as a shell takes them."""
    return shlex.join(HydraConfig.get().overrides.task)


def overrides_of(arguments: Sequence[str]) -> dict[str, str]:
    """Return what command-line arguments change, by config path."""
    overrides = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        overrides[name.lstrip("+~")] = value
    return overrides


def describe(error: Exception) -> str:
    """Return a composition error for people: what is wrong, and the nearest right name where there is one."""
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return f"the run's directory cannot be written ({error}); set hydra.run.dir, or hydra.sweep.dir with -m."
    message = str(error).strip()
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and str(cause).strip() not in message:
        message += "\n" + str(cause).strip()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).removesuffix(".yaml").rpartition("/")
        names = sorted(error.options or _names_in(group))
        return f"{group}={name} is not known; use one of {', '.join(names)}.{suggest(name, names)}"
    if "Ambiguous value" in message or type(error).__name__ == "OverrideParseException":
        message += "\n" + QUOTING_HINT
    if isinstance(error, InterpolationResolutionError):
        message += "\n" + INTERPOLATION_HINT
    unknown = re.search(r"Key '(\w+)' is not in struct\s+full_key: ([\w.]+)", message)
    if unknown:
        section = unknown.group(2).rpartition(".")[0]
        message += suggest(unknown.group(1), _keys_of(section)).replace(" Did", "\nDid")
    return message


def train(work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Return the record of a training; None if it failed on all ranks, which the first one says."""
    from apb_ds.session.steps import JOB_ERRORS, JobError

    try:
        return work()
    except (JobError, *JOB_ERRORS) as error:
        if isinstance(error, JOB_ERRORS) and not isinstance(error, ValueError):
            raise  # this rank alone may have it: it ends, and the launcher ends the others
        if rank() == 0:
            print(f"Error: {error}", file=sys.stderr, flush=True)
        return None


def leave_training_group() -> None:
    """Leave the process group that a training has joined."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def quiet_imports() -> None:
    """Import deepspeed without what it prints, and keep its log to errors, on standard error."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import deepspeed  # noqa: F401
    for name in ("DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.stream = sys.stderr  # not setStream, which flushes the one before: that may be closed


def _in_order(arguments: list[str]) -> list[str]:
    """Return the arguments with the sweep's flag first: Hydra's parser takes no flag between overrides."""
    flags = [argument for argument in arguments if argument in ("-m", "--multirun")]
    return [*flags[:1], *(argument for argument in arguments if argument not in flags)]


def _is_local_rank(argument: str) -> bool:
    return argument.partition("=")[0] in ("--local_rank", "--local-rank")


def _private_directory() -> Path:
    """Return a directory of this process, which removes it; first remove those of processes that were killed."""
    for old in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*-*"):
        process = old.name.removeprefix(SCRATCH_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            is_ours = old.stat().st_uid == os.getuid()
            if is_ours and process.isdigit() and not Path(f"/proc/{process}").exists():
                shutil.rmtree(old, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    ending.at_leaving.append(functools.partial(shutil.rmtree, directory, ignore_errors=True))
    return directory


def _without_traces(arguments: list[str], scratch: Path) -> list[str]:
    """Return the arguments for a rank that leaves nothing behind: no run directory, no log files, no log output."""
    replaced = (
        "hydra/job_logging=",
        "hydra/hydra_logging=",
        "hydra.run.dir=",
        "hydra.sweep.dir=",
        "hydra.output_subdir=",
    )
    kept = [argument for argument in arguments if not argument.startswith(replaced)]
    return [
        *kept,
        f"hydra.run.dir={scratch}",
        f"hydra.sweep.dir={scratch}",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]


def _quiet_environment(debug: bool) -> None:
    defaults = {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if not debug and not sys.warnoptions:
        warnings.simplefilter("ignore")


def _telling(bad_job: BadJob, debug: bool) -> apb_ds_sweep.Failure:
    """Return what is called for a job that cannot be composed."""

    def tell(number: int, arguments: Sequence[str], directory: Path, error: Exception) -> None:
        from apb_ds.session import Job

        if debug and rank() == 0:
            traceback.print_exception(error)
        run_dir = directory if rank() == 0 else None
        bad_job(Job({}, run_dir, overrides_of(arguments), in_sweep=True), describe(error))

    return tell


def _say_once(message: str) -> int:
    """Print an error that every rank has, from the first one only, and return the exit code."""
    if rank() == 0:
        print(f"Error: {message}", file=sys.stderr, flush=True)
    return _wait_for_first_rank()


def _wait_for_first_rank() -> int:
    """Return the exit code for failure; on other ranks only when the first one has had the time to speak.

    A launcher ends all ranks as soon as one of them exits with an error. It does so with SIGTERM, which means here:
    exit with the same code as the first rank.
    """
    if rank() > 0:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED_EXIT))
        time.sleep(FIRST_RANK_GRACE_S)
    return FAILED_EXIT


def _names_in(group: str) -> list[str]:
    return [file.stem for file in (CONFIGS / group).glob("*.yaml")]


def _keys_of(section: str) -> list[str]:
    """Return the keys that a section of the config has in any of its files."""
    keys: set[str] = set()
    for file in (CONFIGS / section.replace(".", "/")).glob("*.yaml"):
        keys |= {str(key) for key in OmegaConf.load(file)}
    return sorted(keys)
