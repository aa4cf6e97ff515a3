"""Real text to train on: what lies on most machines, under licences that allow to use it.

By default the source of Python's standard library (PSF licence), but for the files that `task=fidelity` judges with;
and, where they are there, the licences of Debian (verbatim copying allowed), vim's manual (Open Publication License)
and perl's (Artistic License or GPL). Trained heads hold no text.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from apb_ds.tasks.fidelity import STANDARD_TEXTS
from apb_ds.tasks.synthetic.draws import Draws

FIELD = "train.texts"
EXTRA_PLACES = ("usr/share/common-licenses", "usr/share/vim/vim*/doc", "usr/share/perl/*/pod")
SUFFIXES = ("", ".py", ".txt", ".md", ".rst", ".pod", ".tex", ".c", ".h", ".java", ".js", ".html", ".gz")
IGNORED_FOLDERS = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3")
MIN_BYTES = 4000
MAX_BYTES = 4_000_000
# A piece of text goes to the end of the line in which it has this many letters, or to a blank line after half of them.
PIECE_LETTERS = 240
MAX_PIECE_LETTERS = 900
# One file in so many is set aside to measure on.
HELD_OUT = 10
MAX_PLACES = 8


def find_texts(given: Sequence[str] | None) -> list[Path]:
    """Return the text files to draw from, in an order that depends on nothing but their names.

    Parameters
    ----------
    given : files, and folders with all that is in them; None for the default

    Raises
    ------
    ValueError
        If a name is not there, or nothing in it is a text of some length.
    """
    if given is None:
        return sorted({*_standard_library(), *_extra()})
    found: list[Path] = []
    for name in given:
        path = Path(name).expanduser()
        inside = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if _is_text_file(file)]
        if not inside:
            raise ValueError(f"{FIELD}: {name!r} is no text file and no folder with any of {MIN_BYTES} bytes or more.")
        found += inside
    return sorted(set(found))


def _standard_library() -> Iterator[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    judged = {library / name for name in STANDARD_TEXTS}
    for file in library.rglob("*.py"):
        ignored = file in judged or set(IGNORED_FOLDERS) & set(file.relative_to(library).parts)
        if not ignored and _is_text_file(file):
            yield file


def _extra() -> Iterator[Path]:
    for place in EXTRA_PLACES:
        for folder in {folder.resolve() for folder in Path("/").glob(place)}:  # some are there under two names
            yield from (file for file in folder.iterdir() if _is_text_file(file) and not file.is_symlink())


def _is_text_file(file: Path) -> bool:
    return (
        file.suffix in SUFFIXES
        and file.is_file()
        and MIN_BYTES <= file.stat().st_size <= MAX_BYTES
        and len(read_pieces(file)) > 1
    )


def places_of(files: Sequence[Path]) -> list[str]:
    """Return where texts come from, for people: the standard library by that name, the others by their folders."""
    library = Path(sysconfig.get_paths()["stdlib"])
    name = f"the standard library of Python {platform.python_version()}"
    places = Counter(name if library in file.parents else str(file.parent) for file in files)
    return [f"{place} ({number})" for place, number in places.most_common(MAX_PLACES)]


def split_texts(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the files to train on and those to measure on; which is which depends on a file's name alone."""
    held_out = [file for file in files if _hash(file.name) % HELD_OUT == 0]
    training = [file for file in files if _hash(file.name) % HELD_OUT]
    # With a handful of files it may be that all are on one side.
    return training or held_out, held_out or training


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


@functools.lru_cache(maxsize=256)
def read_pieces(file: Path) -> tuple[str, ...]:
    """Return a text in pieces of some lines each, which together are the text; empty if it is none."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = content.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):
        return ()
    if "\0" in text:
        return ()
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), MAX_PIECE_LETTERS):
            piece += line[start : start + MAX_PIECE_LETTERS]
            if len(piece) >= PIECE_LETTERS or (not line.strip() and len(piece) >= PIECE_LETTERS // 2):
                pieces.append(piece)
                piece = ""
    return tuple(part for part in [*pieces, piece] if part.strip())


class TextFiller:
    """An endless sequence of pieces of real text, file after file; the first ones are the same however many are taken.

    Parameters
    ----------
    files : to draw from
    draws : chooses where to begin, and which file comes next
    """

    def __init__(self, files: Sequence[Path], draws: Draws) -> None:
        self._files = files
        self._draws = draws
        self._pieces: list[str] = []

    def sentences(self, num: int) -> list[str]:
        """Return the first `num` pieces."""
        while len(self._pieces) < num:
            pieces = read_pieces(self._draws.choose(self._files))
            begin = 0 if self._pieces else self._draws.below(len(pieces))
            self._pieces += pieces[begin:]
        return self._pieces[:num]
