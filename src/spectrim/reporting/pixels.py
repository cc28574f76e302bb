"""Pixels as a small PNG file, for pages that hold their own images."""

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from spectrim.core.errors import DataError

# Written here in a few lines: Pillow comes only with an extra, and plotly keeps its writer in a private module.
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPE = {1: 0, 3: 2}
_SAME, _LESS_ABOVE = 0, 2


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file (ISO/IEC 15948), 8 bits a channel, of uint8 pixels (C, H, W) with C = 1 (grey) or 3 (red, green,
    blue).

    Raises `DataError` for another shape or type.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or len(pixels) not in _COLOUR_TYPE or not pixels.size:
        raise DataError(
            f"pixels of shape {pixels.shape} and type {pixels.dtype} are no image; give uint8 (C, H, W) with 1 or 3 "
            "channels"
        )
    channels, height, width = pixels.shape
    rows = np.moveaxis(pixels, 0, 2).reshape(height, width * channels)
    # what a row adds to the one above (modulo 256) often packs better in photographs, and worse in line drawings
    less = np.diff(rows, axis=0, prepend=np.zeros((1, width * channels), dtype=np.uint8))
    packed = min((_packed(rows, _SAME), _packed(less, _LESS_ABOVE)), key=len)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPE[channels], 0, 0, 0)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def png_text(pixels: NDArray[np.uint8]) -> str:
    """The same in base64, as JSON and data URIs take it. Raises `DataError` as `png` does."""
    return base64.b64encode(png(pixels)).decode("ascii")


def _packed(rows: NDArray[np.uint8], filtered: int) -> bytes:
    return zlib.compress(np.insert(rows, 0, filtered, axis=1).tobytes(), 9)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
