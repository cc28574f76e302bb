"""A table as a value: at any width in a terminal, as plain text, and as HTML."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from spectrim.core.display import Displayed
from spectrim.reporting import words

_Item = TypeVar("_Item")

_GAP, _FOLD = 2, 20


@dataclass(frozen=True)
class Column:
    """A column; where the width is short, the one with the highest `level` goes first, and level 0 always stays.

    An `optional` one is left out where no row has anything to say in it.
    """

    head: str
    level: int = 0
    number: bool = True
    narrow: int = 0
    optional: bool = False


@dataclass(frozen=True)
class Listing(Displayed):
    """A table as a value. `rich` prints it at any width; lines within a cell are separated by newlines.

    The first cell of a row names it; `strong` are the positions of rows that stand out; `note` is a line below.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()
    note: str = ""

    def text(self, *, width: int = 100) -> str:
        """Plain text of at most `width` columns, without colours."""
        printed = io.StringIO()
        # in a notebook rich would draw a cell's output, and write nothing
        console = Console(file=printed, width=width, color_system=None, legacy_windows=False, force_jupyter=False)
        console.print(self)
        return "\n".join(line.rstrip() for line in printed.getvalue().splitlines())

    def html(self) -> str:
        """For a notebook, in its own colours; every value is escaped."""
        macros: Any = template("table.html.j2").module
        return str(macros.notebook(self))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        sizes = [self._size(at) for at in range(len(self.columns))]
        visible, hidden = list(range(len(self.columns))), []
        while (spare := options.max_width - sum(sizes[at][0] + _GAP for at in visible) + _GAP) < 0:
            last = max(visible, key=lambda at: self.columns[at].level)
            if self.columns[last].level == 0:
                break
            visible.remove(last)
            hidden.append(self.columns[last].head.replace("\n", " "))
        widths: dict[int, int] = {}
        for at in visible:
            least, whole = sizes[at]
            widths[at] = least + min(max(spare, 0), whole - least)
            spare -= widths[at] - least
        omitted = f"Not shown at this width: {', '.join(hidden)}." if hidden else ""
        yield Text(_clean(self.title), style="bold")
        yield self._drawn(widths)
        if note := " ".join(filter(None, (self.note, omitted))):
            yield Text(_clean(note), style="table.caption")

    def _size(self, at: int) -> tuple[int, int]:
        """The least and the full width of a column: numbers stay whole, words wrap, and a long name folds."""
        column = self.columns[at]
        lines = [line for cell in (column.head, *(row[at] for row in self.rows)) for line in _clean(cell).split("\n")]
        whole = max(map(cell_len, lines))
        longest = max((cell_len(word) for line in lines for word in line.split()), default=0)
        return whole if column.number else min(whole, max(column.narrow, min(longest, _FOLD))), whole

    def _drawn(self, widths: Mapping[int, int]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for at, width in widths.items():
            head, number = _plain(self.columns[at].head), self.columns[at].number
            justify: Literal["left", "right"] = "right" if number else "left"
            table.add_column(head, justify=justify, no_wrap=number, overflow="fold", width=width)
        for position, row in enumerate(self.rows):
            table.add_row(*(_plain(row[at]) for at in widths), style="bold" if position in self.strong else None)
        return table


def listing(
    title: str,
    items: Sequence[_Item],
    columns: Mapping[Column, Callable[[_Item], str]],
    *,
    strong: Callable[[_Item], bool] = lambda item: False,
    note: str = "",
) -> Listing:
    """One row per item, its cells made by the functions of the columns; `strong` says which ones stand out."""
    cells = {column: [cell(item) for item in items] for column, cell in columns.items()}
    silent = {"", words.NOTHING}
    used = {column: texts for column, texts in cells.items() if not (column.optional and silent.issuperset(texts))}
    positions = frozenset(at for at, item in enumerate(items) if strong(item))
    return Listing(title, tuple(used), tuple(zip(*used.values(), strict=True)), strong=positions, note=note)


def _plain(cell: str) -> Text:
    """Text without markup: a name may hold brackets."""
    return Text(_clean(cell))


def _clean(cell: str) -> str:
    """Without control characters, which could change the terminal."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "�" for sign in cell)


@cache
def template(name: str) -> Template:
    """One of the templates in this folder; they escape every value."""
    loader = FileSystemLoader(Path(__file__).parent)
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return jinja.get_template(name)
