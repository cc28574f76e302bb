"""Values that show themselves as a table, by `print` and at the end of a notebook's cell."""

from importlib import import_module
from typing import Any


class Displayed:
    """A value with a table, which `spectrim.reporting` makes.

    That is far above the values, so nothing of it is imported before a value is shown.
    """

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return str(self._table()._repr_html_())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: FBT001  # as IPython calls it
        """What IPython shows, and a notebook's file holds, as text."""
        printer.text(str(self))

    def _table(self) -> Any:
        return import_module("spectrim.reporting.tables").table(self)
