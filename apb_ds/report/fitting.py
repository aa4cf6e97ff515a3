"""Tables that fit the terminal without breaking a number over two lines."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

ABSENT = "-"
MIN_TEXT_WIDTH = 12  # text is wrapped to this before a column gives way
MAX_WORD_WIDTH = 20  # longer words of text may be broken
# The spaces within "130 944" and "1.5 GiB".
INNER_SPACE = re.compile(r"(?<=\d) (?=\d{3}(?!\d)|(?:B|KiB|MiB|GiB|s|ms|us|GB/s|tokens/s)\b)")
HARD_SPACE = "\N{NO-BREAK SPACE}"
SOFT_BREAK = "\v"  # where a word may be wrapped; whitespace to textwrap, and nothing in print
NUMBER = re.compile(r"\(?[+-]?\d[\d.,]*[%x)]*")


@dataclass(frozen=True)
class Column:
    """A column of a `FittedTable`.

    Attributes
    ----------
    is_text : whether it holds text, which is aligned to the left and may wrap between words; else numbers, which stay
        whole
    drop : 0 for a column that always stays; others give way in a narrow terminal, those with the highest number first
    """

    name: str
    is_text: bool = False
    drop: int = 0


class FittedTable:
    """A table that chooses its columns when it is printed, by the width that is available.

    Columns without any value are left out. If the rest is too wide, headers and text wrap first; then columns give way
    by `Column.drop`, and a line below the table names them.

    Parameters
    ----------
    split : instead of leaving columns out, print them as further tables, each with the columns that always stay
    keep_empty : keep columns without any value
    """

    def __init__(
        self,
        columns: Sequence[Column],
        *,
        title: str = "",
        show_header: bool = True,
        split: bool = False,
        keep_empty: bool = False,
    ) -> None:
        self.columns = list(columns)
        self.title = title
        self.show_header = show_header
        self.split = split
        self.keep_empty = keep_empty
        self.notes: list[str] = []
        self._rows: list[tuple[str, ...]] = []
        self._sections: set[int] = set()

    def add_row(self, *cells: str) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"a row has {len(cells)} cells; the table has {len(self.columns)} columns.")
        self._rows.append(cells)

    def add_section(self) -> None:
        """Draw a line below the last row."""
        self._sections.add(len(self._rows) - 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = options.max_width
        columns = range(len(self.columns))
        used = [index for index in columns if self.keep_empty or any(row[index] != ABSENT for row in self._rows)]
        groups, dropped = self._choose(used, width)
        if self.title:
            yield Text(_wrap(self.title, width), style="italic")
        for group in groups:
            yield self._table(group, width)
        names = ", ".join(self.columns[index].name for index in dropped)
        for note in (*self.notes, *([f"Not shown at this width: {names}."] if dropped else [])):
            yield Text(_wrap(note, width), style="dim italic")

    def _choose(self, used: list[int], width: int) -> tuple[list[list[int]], list[int]]:
        """Return the columns of each table, and those that are left out."""

        def fits(indices: Sequence[int]) -> bool:
            return _total(map(self._min_width, indices)) <= width

        fixed = [index for index in used if not self.columns[index].drop]
        if not self.split:
            dropped: list[int] = []
            while not fits(used) and len(used) > max(1, len(fixed)):
                last = max((index for index in used if index not in fixed), key=lambda index: self.columns[index].drop)
                used = [index for index in used if index != last]
                dropped.append(last)
            return [used], sorted(dropped)
        groups = [list(fixed)]
        for index in (index for index in used if index not in fixed):
            if not fits([*groups[-1], index]) and len(groups[-1]) > len(fixed):
                groups.append(list(fixed))
            groups[-1].append(index)
        return groups, []

    def _table(self, indices: Sequence[int], width: int) -> Table:
        widths = self._widths(indices, width)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), show_header=self.show_header)
        for index in indices:
            column = self.columns[index]
            header = _wrap(column.name, widths[index])
            table.add_column(
                Text(header), justify="left" if column.is_text else "right", width=widths[index], no_wrap=True
            )
        for number, row in enumerate(self._rows):
            cells = (_wrap(row[index], widths[index]) for index in indices)
            table.add_row(*(Text(cell) for cell in cells), end_section=number in self._sections)
        return table

    def _widths(self, indices: Sequence[int], width: int) -> dict[int, int]:
        """Return the widths of columns: their natural ones, the widest made narrower as long as they do not fit."""
        widths = {index: max(map(len, self._texts(index))) for index in indices}
        least = {index: self._min_width(index) for index in indices}
        while _total(widths.values()) > width:
            wide = [index for index in indices if widths[index] > least[index]]
            if not wide:
                break
            widths[max(wide, key=lambda index: widths[index])] -= 1
        return widths

    def _min_width(self, index: int) -> int:
        header, *cells = self._texts(index)
        needed = [len(word) for word in _words(header)]
        if not self.columns[index].is_text:
            return max([*needed, *map(len, cells)])
        for word in (word for cell in cells for word in _words(cell)):
            is_whole = HARD_SPACE in word or NUMBER.fullmatch(word)
            needed.append(len(word) if is_whole else min(len(word), MAX_WORD_WIDTH))
        return max([*needed, *(min(len(cell), MIN_TEXT_WIDTH) for cell in cells)])

    def _texts(self, index: int) -> list[str]:
        return [self.columns[index].name if self.show_header else "", *(row[index] for row in self._rows)]


def _total(widths: Iterable[int]) -> int:
    """Return the width of a table whose columns have these widths."""
    found = list(widths)
    return sum(found) + 2 * len(found) + 1


def _words(text: str) -> list[str]:
    """Return the parts that text may be wrapped between: words, and what stands around an equals sign."""
    return re.split(r"[ \n]|(?<==)", INNER_SPACE.sub(HARD_SPACE, text))


def _wrap(text: str, width: int) -> str:
    """Wrap text between words, never within a number."""
    lines = []
    for line in text.splitlines():
        words = INNER_SPACE.sub(HARD_SPACE, line).split(" ")
        parts = (word.replace("=", f"={SOFT_BREAK}") if len(word) > width else word for word in words)
        wrapped = textwrap.wrap(" ".join(parts), max(width, 1), break_on_hyphens=False, replace_whitespace=False)
        lines += wrapped or [""]
    return "\n".join(lines).replace(HARD_SPACE, " ").replace(SOFT_BREAK, "")
