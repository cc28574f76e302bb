"""Sizes of networks, checked before anything is built from them."""

from collections.abc import Mapping

from spectrim.core.errors import ModelError


def require_positive(sizes: Mapping[str, object]) -> None:
    """ModelError unless every size is a whole number of at least 1; torch itself builds layers of size 0."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ModelError(f"{name} is {size!r}; give a whole number of at least 1")
