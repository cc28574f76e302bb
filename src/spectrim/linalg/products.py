"""Products of large matrices."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

_BLOCKS, _BLOCK = 8, 256
"""Blocks that the products of wide vectors are divided into, at most, and how wide each is at least."""

_MOST = 100
"""The power of two that a matrix in float32 is scaled by, at most."""

_SAFE, _LARGEST = 24, 126
"""Powers of two whose fourth power float32 holds, and which it holds themselves."""

_ORDINARY = {Tensor, nn.Parameter}

_HAS_BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """A B of matrices (.., n, k) and (.., k, m).

    Large ones of float32 are multiplied on a CPU as a convolution of one place, which PyTorch gives to oneDNN: on AMD
    it is twice as fast as MKL, to which it gives products of matrices.
    """
    is_traced = torch.compiler.is_compiling() or torch._C._is_tracing()
    if is_traced or type(A) not in _ORDINARY or type(B) not in _ORDINARY or A.is_meta:
        return A @ B
    if torch.is_autocast_enabled(A.device.type):
        with torch.autocast(A.device.type, enabled=False):
            return matmul(A, B)
    (n, k), m = A.shape[-2:], B.shape[-1]
    if len(A) == len(B) == 1 and A.ndim == B.ndim == 3:
        return matmul(A[0], B[0]).unsqueeze(0)
    are_slow = _HAS_BOTH and A.device.type == "cpu" and A.dtype == B.dtype == torch.float32
    if A.ndim > 2 or not are_slow or min(n, k, m) < 64 or n * k * m < 2**25:
        return A @ B
    if n < m:  # the smaller one takes the place of the kernel
        return matmul(B.mT, A.mT).mT
    places, kernels = A.reshape(1, n, 1, k).permute(0, 3, 1, 2), B.mT.reshape(m, k, 1, 1)
    # the dilation changes nothing here, but without it MKL is taken where there is one thread
    return functional.conv2d(places, kernels, dilation=2).permute(0, 2, 3, 1).reshape(n, m)


def times_rounded(M: Tensor, C: Tensor) -> Tensor:
    """M C in the type of M, of float64 M (.., k, n); where C is in float32, it is rounded as C is.

    M is divided by a power of two first, so that the range of float32 suffices.
    """
    if C.dtype != torch.float32 or not C.numel() or not M.numel():
        return M @ C.to(M.dtype)
    top, other = (float(torch.stack(torch.aminmax(part)).abs().max()) for part in (M, C))
    # by no more than lets M keep its digits, and its range, beside entries of C that are hardly numbers
    power = 2.0 ** (max(-900, min(math.frexp(top)[1], 900)) + max(-_MOST, min(math.frexp(other)[1], _MOST)))
    is_safe = 1e-20 < top < 1e20
    rounded = M.to(C.dtype, copy=True).div_(power) if is_safe else (M / power).to(C.dtype)
    return matmul(rounded, C).to(M.dtype).mul_(power)


def gram(rows: Tensor) -> Tensor:
    """X^T X of rows (.., n, width); of wide ones only the blocks on and above the diagonal are multiplied."""
    width = rows.shape[-1]
    if width < 4 * _BLOCK:
        return matmul(rows.mT, rows)
    if rows.ndim > 2:
        return gram(rows[0]).unsqueeze(0) if len(rows) == 1 else torch.stack([gram(own) for own in rows])
    columns = rows.T.contiguous()
    whole, step = rows.new_empty(width, width), max(_BLOCK, -(-width // _BLOCKS))
    for start in range(0, width, step):
        block = matmul(columns[start : start + step], columns[start:].T)
        whole[start : start + step, start:] = block
        whole[start + step :, start : start + step] = block[:, step:].T
    return whole


def in_range(rows: Tensor) -> tuple[Tensor, float]:
    """Vectors divided by a power of two, where their squares would leave the range of their type, and this power."""
    low, high = (float(value) for value in rows.aminmax()) if rows.numel() else (0.0, 0.0)
    exponent = max(-_LARGEST, min(math.frexp(max(-low, high))[1], _LARGEST))
    return (rows, 1.0) if abs(exponent) < _SAFE else (torch.ldexp(rows, torch.tensor(-exponent)), 2.0**exponent)
