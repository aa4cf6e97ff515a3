"""The answers of a batch, as JSONL: a line each, safe as soon as it is written, and resumed after an interruption."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from apb_ds.report.record import remove_scratch, replace_file, sync_directory, write_json

SHOWN_KEYS = 5
SHOWN_CHARACTERS = 60
START_ANEW = "give another task.output, or task.overwrite=true to start anew (the old output is kept as .bak)"
OUTCOMES = ("answer", "error")


class AnswerFile:
    """The output of a batch, to be used as a context manager by one process.

    Opening an output that exists resumes it: what is answered already is kept, provided that the question and the
    settings are the same; errors are dropped, to be tried again. Opening changes no answer; the first `append` or
    `finish` removes what is dropped. A process that is killed loses at most the line that it was writing.

    Parameters
    ----------
    path : Path
        The output. The settings lie beside it in ``<path>.settings.json``, the lock in ``<path>.lock`` while it is
        open, and with `overwrite` the old output in ``<path>.bak``. A link is followed.
    lines : sequence of (id, fingerprint)
        The questions in the order of the input; ids differ as strings.
    settings : dict of JSON values
        What the answers depend on besides their lines.
    overwrite : bool
        Start anew.

    Attributes
    ----------
    kept : dict of int to dict
        The results of earlier runs that stay, by place in the input.
    changed : list of ids
        Questions that were answered, but have changed since: their answers are dropped.

    Raises
    ------
    ValueError
        On entering, if the path cannot be written, another run has it open, or it holds something else than answers
        to these questions with these settings. The output is as it was then.
    """

    def __init__(
        self,
        path: Path,
        lines: Sequence[tuple[str | int, str]],
        settings: dict[str, Any],
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(os.path.realpath(path))  # or the replacing of a file would cut a link
        self.settings_path = self.path.with_name(f"{self.path.name}.settings.json")
        self.kept: dict[int, dict[str, Any]] = {}
        self.changed: list[str | int] = []
        self._lines = list(lines)
        self._settings: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
        self._overwrite = overwrite
        self._results: dict[int, dict[str, Any]] = {}  # by place in the input, in the order of the file
        self._must_rewrite = False
        self._is_started = False
        self._stream: FileIO | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            kind = "is a directory" if os.path.isdir(self.path) else "is no file"
            raise ValueError(f"task.output={self.path} {kind}; name a file.")
        with contextlib.ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(self.path))
                for path in (self.path, self.settings_path):
                    remove_scratch(path)
                if self._overwrite:
                    self._set_aside()
                elif self.path.exists():
                    self._resume()
                self._stream = stack.enter_context(self._open_stream())
                sync_directory(self.path.parent)
            except OSError as error:
                raise ValueError(
                    f"task.output={self.path} cannot be written ({error}); name a file in a folder that can."
                ) from error
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()  # the one that a rewriting has opened
        self._stream = None
        self._open.close()

    def append(self, index: int, result: dict[str, Any]) -> None:
        """Write the result of the question at place `index` of the input: one line, on the disk on return.

        Raises
        ------
        ValueError
            If `result` has not either an ``answer`` or an ``error``, or the question has a result already.
        OSError
            If it cannot be written; nothing of it is in the file then.
        """
        if sum(key in result for key in OUTCOMES) != 1 or not result.keys().isdisjoint(("id", "fingerprint")):
            raise ValueError(f"a result has either an answer or an error, and no id or fingerprint: {sorted(result)}.")
        key, fingerprint = self._lines[index]
        if index in self._results:
            raise ValueError(f"the question with id {key!r} has a result already.")
        record = {"id": key, **result, "fingerprint": fingerprint}
        line = _encode(record)
        self._start()
        self._write(line)
        self._results[index] = record

    def finish(self) -> None:
        """Bring the results into the order of the input."""
        self._start()
        if list(self._results) != sorted(self._results):
            ordered = dict(sorted(self._results.items()))
            self._rewrite(ordered.values())
            self._results = ordered

    def _start(self) -> None:
        """Remove what is dropped, then leave the settings beside the output; before the first result."""
        if self._is_started:
            return
        if self._must_rewrite:
            self._rewrite(self._results.values())
            self._must_rewrite = False
        if not self.kept:  # in this order: no answer of other settings is ever beside these
            write_json(self.settings_path, self._settings)
        self._is_started = True

    def _rewrite(self, records: Iterable[dict[str, Any]]) -> None:
        with replace_file(self.path) as stream:
            for record in records:
                stream.write(_encode(record).decode("utf-8"))
        old, self._stream = self._stream, self._open_stream()
        if old is not None:
            old.close()

    def _open_stream(self) -> FileIO:
        # Not buffered: what could not be written must not come later, behind the next line.
        return open(self.path, "ab", buffering=0)

    def _write(self, line: bytes) -> None:
        assert self._stream is not None, "append() and finish() are for within the with block"
        size = os.fstat(self._stream.fileno()).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._stream.write(rest) :]
            os.fsync(self._stream.fileno())
        except BaseException:
            # Half a line would break the next one.
            with contextlib.suppress(OSError):
                self._stream.truncate(size)
            raise

    def _set_aside(self) -> None:
        """Move the old output away; an empty one would only push out the one that was moved before."""
        if self.path.exists() and self.path.stat().st_size:
            backup = self.path.with_name(f"{self.path.name}.bak")
            os.replace(self.path, backup)
            # So that the old answers can be resumed, once they have their old name or under the new one.
            settings = backup.with_name(f"{backup.name}.settings.json")
            settings.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.settings_path, settings)

    def _resume(self) -> None:
        """Take over the results that stay; changes nothing on the disk."""
        records, self._must_rewrite = _read_results(self.path)
        places = {str(key): index for index, (key, _) in enumerate(self._lines)}
        foreign = [record["id"] for record in records if "answer" in record and str(record["id"]) not in places]
        if foreign:
            more = f" and {len(foreign) - SHOWN_KEYS} more" if len(foreign) > SHOWN_KEYS else ""
            shown = ", ".join(_shown(key) for key in foreign[:SHOWN_KEYS])
            raise ValueError(
                f"task.output={self.path} has answers to ids that the input does not have: {shown}{more}; {START_ANEW}."
            )
        for record in records:
            if "answer" not in record:
                self._must_rewrite = True
                continue
            index = places[str(record["id"])]
            if record["fingerprint"] == self._lines[index][1]:
                self.kept[index] = record
            else:
                self.changed.append(self._lines[index][0])
                self._must_rewrite = True
        self._results = dict(self.kept)
        if self.kept:
            self._check_settings()

    def _check_settings(self) -> None:
        """Raise ValueError unless the answers that are kept came from the same settings."""
        try:
            old = json.loads(self.settings_path.read_text(encoding="utf-8"))
            if not isinstance(old, dict):
                raise ValueError("no object")
        except FileNotFoundError:
            raise ValueError(
                f"task.output={self.path} has answers, but {self.settings_path.name} beside it is missing, which says "
                f"with what settings they were made; {START_ANEW}."
            ) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.settings_path} cannot be used ({error}); {START_ANEW}.") from error
        before, now = _flatten(old), _flatten(self._settings)
        differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if differing:
            parts = [
                f"{key} was {_short(before.get(key, 'not set'))} and is {_short(now.get(key, 'not set'))}"
                for key in differing[:SHOWN_KEYS]
            ]
            more = f"; and {len(differing) - SHOWN_KEYS} more" if len(differing) > SHOWN_KEYS else ""
            raise ValueError(
                f"task.output={self.path} has answers made with other settings: {'; '.join(parts)}{more}. "
                f"Use the old settings, {START_ANEW}."
            )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of the output at `path`, or raise ValueError if another run does."""
    file = path.with_name(f"{path.name}.lock")
    lock = FileLock(str(file), timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"task.output={path} is being written by another run ({file.name} is locked); wait for it, or give "
            "another task.output."
        ) from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held, or it may be another run's by now
        lock.release()


def _read_results(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the results in the output at `path`, and whether there is more in it than their lines."""
    records: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    is_more = False
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            is_whole = raw.endswith(b"\n")
            record = _load(raw)
            if not _is_result(record):
                # A run that was killed leaves the start of an object, or after a power cut zeros.
                is_torn = record is None and not is_whole and raw.lstrip(b"\0")[:1] in (b"", b"{")
                if raw.strip() and not is_torn:
                    start = raw[:SHOWN_CHARACTERS].decode("utf-8", "replace")
                    raise ValueError(
                        f"task.output={path}: line {number} is no result of a batch: {_shown(start)}; mend it, "
                        f"{START_ANEW}."
                    )
                is_more = True
                continue
            first = numbers.setdefault(str(record["id"]), number)
            if first != number:
                raise ValueError(
                    f"task.output={path}: lines {first} and {number} are both of id {_shown(record['id'])}; remove "
                    f"one, {START_ANEW}."
                )
            is_more = is_more or not is_whole
            records.append(record)
    return records, is_more


def _load(raw: bytes) -> Any:
    """Return what a line says, None if it is no JSON."""
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _is_result(record: Any) -> bool:
    """Whether a line's content is a result that `AnswerFile.append` can have written."""
    if not isinstance(record, dict) or sum(key in record for key in OUTCOMES) != 1:
        return False
    key = record.get("id")
    is_id = isinstance(key, (str, int)) and not isinstance(key, bool)
    return is_id and isinstance(record.get("fingerprint"), str)


def _encode(record: dict[str, Any]) -> bytes:
    """Return the line of a result."""
    try:
        return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, say of a file name in an error, has no UTF-8
        return (json.dumps(record, allow_nan=False) + "\n").encode("ascii")


def _flatten(values: object, prefix: str = "") -> dict[str, str]:
    """Return the values that are no dicts as JSON, by their dotted keys."""
    if isinstance(values, dict) and (values or not prefix):
        found: dict[str, str] = {}
        for key, value in values.items():
            found |= _flatten(value, f"{prefix}.{key}" if prefix else key)
        return found
    if isinstance(values, float) and values.is_integer():  # 8.0 on the command line is 8
        values = int(values)
    return {prefix: json.dumps(values, ensure_ascii=False, sort_keys=True)}


def _shown(value: object) -> str:
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
