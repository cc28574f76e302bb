"""Transformers learns of factored layers as soon as both are imported, in either order; Spectrim never imports it."""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from spectrim.core.errors import warn

_AWAITED = "transformers.modeling_utils"
_INTEGRATION = "spectrim.integrations.huggingface"


def register() -> None:
    """Import the integration now if transformers' models are imported, or else right after they are."""
    if _AWAITED in sys.modules:
        _integrate()
    else:
        sys.meta_path.insert(0, _Finder())


def _integrate() -> None:
    try:
        importlib.import_module(_INTEGRATION)
    except ImportError as error:
        warn(
            f"this version of transformers is too old to save and load factored layers ({error}); keep them with "
            "st.save(model, path)"
        )


class _Finder:
    """Finds one module, where Python finds it, and has the integration imported after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec; None for every other module."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _AWAITED else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_integrate(module: ModuleType) -> None:
            execute(module)
            _integrate()

        spec.loader.exec_module = execute_and_integrate  # type: ignore[method-assign]
        return spec
