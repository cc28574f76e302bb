"""Tensors in, tensors out: spectra, and the best factors of every form in the plain and in a data metric.

Algebra is done in float64 whatever the weights' type, on the weights' device where it has float64. Products with
statistics in float32, the steps on a shared projection in their metric, and products of wide weights are in float32.
"""

from spectrim.linalg.channel import ChannelDecomposition
from spectrim.linalg.covariance import (
    MOST_DOUBLE_INPUTS,
    Covariance,
    DiagonalCovariance,
    LowRankCovariance,
    add_covariances,
    add_outer,
    matrix_of,
    mean_variance,
    shrunk,
    square_around,
    square_of,
)
from spectrim.linalg.heads import HeadDecomposition, HeadLayout, head_ranks
from spectrim.linalg.interpolation import interpolated
from spectrim.linalg.problem import Decomposition, Factors, PartnerMoments, Problem, Ranks, balanced, is_wide
from spectrim.linalg.scores import ScoreDecomposition
from spectrim.linalg.spatial import SpatialDecomposition
from spectrim.linalg.spectra import FloatArray, Spectrum, spectrum, to_float64
from spectrim.linalg.subset import SubsetDecomposition
from spectrim.linalg.subspace import Truncated, truncate, truncate_exactly
from spectrim.linalg.tucker2 import Tucker2Decomposition

__all__ = [
    "MOST_DOUBLE_INPUTS",
    "ChannelDecomposition",
    "Covariance",
    "Decomposition",
    "DiagonalCovariance",
    "Factors",
    "FloatArray",
    "HeadDecomposition",
    "HeadLayout",
    "LowRankCovariance",
    "PartnerMoments",
    "Problem",
    "Ranks",
    "ScoreDecomposition",
    "SpatialDecomposition",
    "Spectrum",
    "SubsetDecomposition",
    "Truncated",
    "Tucker2Decomposition",
    "add_covariances",
    "add_outer",
    "balanced",
    "head_ranks",
    "interpolated",
    "is_wide",
    "matrix_of",
    "mean_variance",
    "shrunk",
    "spectrum",
    "square_around",
    "square_of",
    "to_float64",
    "truncate",
    "truncate_exactly",
]
