"""Values that show themselves as a table, by `print` and at the end of a notebook's cell."""

from importlib import import_module
from typing import Any


class Displayed:
    """A value with a table, which `spectrim.reporting` makes.

    That is far above the values, so nothing of it is imported before a value is shown.
    """

    def __str__(self) -> str:
        return str(self._table().text())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return str(self._table().html())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """What IPython shows as text, and a notebook's file holds, in the place of the long `repr`."""
        return {"text/plain": str(self)}

    def _table(self) -> Any:
        return import_module("spectrim.reporting.tables").table(self)
