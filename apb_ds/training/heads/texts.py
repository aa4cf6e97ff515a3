"""Real text to train on: what most machines have, under licences that allow this use.

By default the source of Python's standard library (PSF licence), except the files that `task=fidelity` evaluates on;
and, where installed, Debian's licences (verbatim copying allowed), vim's manual (Open Publication License) and perl's
(Artistic License or GPL). Trained heads contain no text.
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
# A piece of text ends with the line in which it reaches this many letters, or at a blank line after half of them.
PIECE_LETTERS = 240
MAX_PIECE_LETTERS = 900
# One file in so many is held out.
HELD_OUT = 10
MAX_PLACES = 8


def find_texts(given: Sequence[str] | None) -> list[Path]:
    """Return the text files to draw from, in an order that depends on their names only.

    Parameters
    ----------
    given : files, and folders that are searched recursively; None for the default

    Raises
    ------
    ValueError
        If a name does not exist or contains no text file.
    """
    if given is None:
        return sorted({*_standard_library(), *_extra()})
    found: list[Path] = []
    for name in given:
        path = Path(name).expanduser()
        inside = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if _is_text_file(file)]
        if not inside:
            raise ValueError(
                f"{FIELD}: {name!r} is neither a text file nor a folder with text files of {MIN_BYTES} bytes."
            )
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
        for folder in {folder.resolve() for folder in Path("/").glob(place)}:  # some have two names
            yield from (file for file in folder.iterdir() if _is_text_file(file) and not file.is_symlink())


def _is_text_file(file: Path) -> bool:
    return (
        file.suffix in SUFFIXES
        and file.is_file()
        and MIN_BYTES <= file.stat().st_size <= MAX_BYTES
        and len(read_pieces(file)) > 1
    )


def places_of(files: Sequence[Path]) -> list[str]:
    """Return where texts come from, for the card: the standard library by that name, the others by their folders."""
    library = Path(sysconfig.get_paths()["stdlib"])
    name = f"the standard library of Python {platform.python_version()}"
    places = Counter(name if library in file.parents else str(file.parent) for file in files)
    return [f"{place} ({number})" for place, number in places.most_common(MAX_PLACES)]


def split_texts(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the files to train on and those to measure on; the split depends on their names only."""
    held_out = [file for file in files if _hash(file.name) % HELD_OUT == 0]
    training = [file for file in files if _hash(file.name) % HELD_OUT]
    # A handful of files may all fall on one side.
    return training or held_out, held_out or training


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


@functools.lru_cache(maxsize=256)
def read_pieces(file: Path) -> tuple[str, ...]:
    """Return a text in consecutive pieces of some lines each; () if the file is not text."""
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
    """An endless sequence of pieces of real text, file after file. It does not depend on how many are taken.

    Parameters
    ----------
    files : to draw from
    draws : chooses where to begin, and each next file
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
