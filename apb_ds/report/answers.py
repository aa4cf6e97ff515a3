"""The answers of a batch as JSONL: a line each, on disk as soon as it is written, and resumed after an interruption."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from apb_ds.report.record import remove_scratch, replace_file, sync_directory, write_json
from apb_ds.report.results import flatten

SHOWN_KEYS = 5
SHOWN_CHARACTERS = 60
OUTCOMES = ("answer", "error")

Result = dict[str, Any]


class AnswerFile:
    """The output of a batch; a context manager for one process.

    Opening an existing output resumes it. Answers are kept if their question and the settings are the same; errors are
    dropped and tried again. Opening changes no answer: the first `append` or `finish` removes what is dropped. A
    process that is killed loses at most the line it was writing.

    Parameters
    ----------
    path : Path
        The output. Next to it are the settings, ``<path>.settings.json``; while it is open the lock, ``<path>.lock``;
        and with `overwrite` the old output, ``<path>.bak``. Links are followed.
    lines : sequence of (id, fingerprint)
        The questions in the order of the input. Ids must differ as strings.
    settings : dict of JSON values
        What the answers depend on besides their lines.
    overwrite : bool
        Start over.
    section : str
        The config section that has ``output`` and ``overwrite``, for messages.

    Attributes
    ----------
    kept : dict of int to dict
        Results of earlier runs that stay, by index in the input.
    changed : list of ids
        Questions whose answers are dropped because they have changed.

    Raises
    ------
    ValueError
        On entering, if the path cannot be written, another run has it open, or it holds something other than answers
        to these questions with these settings. The output is left as it was.
    """

    def __init__(
        self,
        path: Path,
        lines: Sequence[tuple[str | int, str]],
        settings: dict[str, Any],
        *,
        overwrite: bool = False,
        section: str = "task",
    ) -> None:
        self.path = Path(os.path.realpath(path))  # replacing the file at a link would cut the link
        self.settings_path = self.path.with_name(f"{self.path.name}.settings.json")
        self.kept: dict[int, Result] = {}
        self.changed: list[str | int] = []
        self._lines = list(lines)
        self._settings: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
        self._overwrite = overwrite
        self._section = section
        self._where = f"{section}.output: {self.path}"
        self._way_out = (
            f"give another {section}.output, or {section}.overwrite=true to start over (the old output is kept as .bak)"
        )
        self._results: dict[int, Result] = {}  # by index in the input, in the order of the file
        self._must_rewrite = False
        self._is_started = False
        self._stream: FileIO | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            kind = "is a directory" if os.path.isdir(self.path) else "is not a regular file"
            raise ValueError(f"{self._where} {kind}; give another {self._section}.output.")
        with contextlib.ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(self._locked())
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
                    f"{self._where} cannot be written ({error}); give another {self._section}.output, in a folder that "
                    "can be written."
                ) from error
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._stream.close()  # rewriting opens another one than `_open` closes
        self._stream = None
        self._open.close()

    def append(self, index: int, result: Result) -> None:
        """Write the result of question `index` of the input as one line, which is on disk on return.

        Raises
        ------
        ValueError
            If `result` does not have exactly one of ``answer`` and ``error``, or the question already has a result.
        OSError
            If it cannot be written; nothing of it is then in the file.
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
        """Put the results into the order of the input."""
        self._start()
        if list(self._results) != sorted(self._results):
            ordered = dict(sorted(self._results.items()))
            self._rewrite(ordered.values())
            self._results = ordered

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the output, or raise ValueError if another run does."""
        file = self.path.with_name(f"{self.path.name}.lock")
        lock = FileLock(str(file), timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"{self._where} is being written by another run ({file.name} is locked); wait for it, or give "
                f"another {self._section}.output."
            ) from error
        try:
            yield
        finally:
            file.unlink(missing_ok=True)  # before the release: afterwards it may be another run's
            lock.release()

    def _read_results(self) -> tuple[list[Result], bool]:
        """Return the results in the output, and whether the file has anything besides their lines."""
        records: list[Result] = []
        numbers: dict[str, int] = {}
        has_more = False
        with self.path.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                is_whole = raw.endswith(b"\n")
                record = _parse(raw)
                if not _is_result(record):
                    # A killed run leaves the start of an object, a power cut zeros.
                    is_torn = record is None and not is_whole and raw.lstrip(b"\0")[:1] in (b"", b"{")
                    if raw.strip() and not is_torn:
                        start = raw[:SHOWN_CHARACTERS].decode("utf-8", "replace")
                        raise ValueError(
                            f"{self._where}, line {number} is not a result: {_quote(start)}; fix it, {self._way_out}."
                        )
                    has_more = True
                    continue
                first = numbers.setdefault(str(record["id"]), number)
                if first != number:
                    raise ValueError(
                        f"{self._where}, lines {first} and {number} both have id {_quote(record['id'])}; remove "
                        f"one, {self._way_out}."
                    )
                has_more = has_more or not is_whole
                records.append(record)
        return records, has_more

    def _start(self) -> None:
        """Before the first result: remove what is dropped, then write the settings."""
        if self._is_started:
            return
        if self._must_rewrite:
            self._rewrite(self._results.values())
            self._must_rewrite = False
        if not self.kept:  # in this order, so that answers never lie next to settings they were not made with
            write_json(self.settings_path, self._settings)
        self._is_started = True

    def _rewrite(self, records: Iterable[Result]) -> None:
        with replace_file(self.path) as stream:
            stream.writelines(_encode(record).decode("utf-8") for record in records)
        old, self._stream = self._stream, self._open_stream()
        if old is not None:
            old.close()

    def _open_stream(self) -> FileIO:
        return open(self.path, "ab", buffering=0)  # a buffer would write a failed line later, behind the next one

    def _write(self, line: bytes) -> None:
        assert self._stream is not None, "append() and finish() work inside the with block only"
        size = os.fstat(self._stream.fileno()).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._stream.write(rest) :]
            os.fsync(self._stream.fileno())
        except BaseException:
            with contextlib.suppress(OSError):  # half a line would break the next one
                self._stream.truncate(size)
            raise

    def _set_aside(self) -> None:
        """Move the old output and its settings to ``.bak``, unless it is empty: that would replace an older backup."""
        if self.path.exists() and self.path.stat().st_size:
            backup = self.path.with_name(f"{self.path.name}.bak")
            os.replace(self.path, backup)
            settings = backup.with_name(f"{backup.name}.settings.json")
            settings.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.settings_path, settings)

    def _resume(self) -> None:
        """Take over the results that stay; changes nothing on disk."""
        records, self._must_rewrite = self._read_results()
        indices = {str(key): index for index, (key, _) in enumerate(self._lines)}
        foreign = [record["id"] for record in records if "answer" in record and str(record["id"]) not in indices]
        if foreign:
            raise ValueError(
                f"{self._where} has answers to ids that the input does not have: "
                f"{_first(map(_quote, foreign), ', ', ' and')}; {self._way_out}."
            )
        for record in records:
            index = indices[str(record["id"])] if "answer" in record else None
            if index is not None and record["fingerprint"] == self._lines[index][1]:
                self.kept[index] = record
                continue
            self._must_rewrite = True
            if index is not None:
                self.changed.append(self._lines[index][0])
        self._results = dict(self.kept)
        if self.kept:
            self._check_settings()

    def _check_settings(self) -> None:
        """Raise ValueError unless the kept answers were made with the same settings."""
        try:
            old = json.loads(self.settings_path.read_text(encoding="utf-8"))
            if not isinstance(old, dict):
                raise ValueError("not an object")
        except FileNotFoundError:
            raise ValueError(
                f"{self._where} has answers, but the settings they were made with, "
                f"{self.settings_path.name}, are missing; {self._way_out}."
            ) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.settings_path} cannot be read ({error}); {self._way_out}.") from error
        before, now = _texts(old), _texts(self._settings)
        changes = [
            f"{key} was {_short(before.get(key, 'not set'))} and is {_short(now.get(key, 'not set'))}"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        if changes:
            raise ValueError(
                f"{self._where} has answers made with other settings: {_first(changes, '; ', '; and')}. "
                f"Use the old settings, {self._way_out}."
            )


def _parse(raw: bytes) -> Any:
    """Return the content of a line, None if it is not JSON."""
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _is_result(record: Any) -> bool:
    """Whether `AnswerFile.append` can have written a line with this content."""
    if not isinstance(record, dict) or sum(key in record for key in OUTCOMES) != 1:
        return False
    return type(record.get("id")) in (str, int) and isinstance(record.get("fingerprint"), str)


def _encode(record: Result) -> bytes:
    """Return the line of a result."""
    try:
        return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, for example from a file name, has no UTF-8
        return (json.dumps(record, allow_nan=False) + "\n").encode("ascii")


def _texts(settings: dict[str, Any]) -> dict[str, str]:
    """Return settings as JSON, by dotted path."""
    whole = {
        path: int(value) if isinstance(value, float) and value.is_integer() else value  # 8.0 on the command line is 8
        for path, value in flatten(settings).items()
    }
    return {path: json.dumps(value, ensure_ascii=False, sort_keys=True) for path, value in whole.items()}


def _first(texts: Iterable[str], separator: str, last: str) -> str:
    """Join the first `SHOWN_KEYS` texts, and say how many more there are."""
    found = list(texts)
    more = f"{last} {len(found) - SHOWN_KEYS} more" if len(found) > SHOWN_KEYS else ""
    return separator.join(found[:SHOWN_KEYS]) + more


def _quote(value: object) -> str:
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
