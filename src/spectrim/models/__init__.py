"""Small reference networks for studies and tests."""

from spectrim.models.mlp import mlp

__all__ = ["mlp"]
