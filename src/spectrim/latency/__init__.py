"""Latency: what every layer takes in every form on this machine and runtime, and what a whole network then takes."""

from spectrim.latency.cache import cache_folder
from spectrim.latency.making import latency_table
from spectrim.latency.table import FormTimes, LatencyTable, LayerTimes
from spectrim.latency.trial import random_factors

__all__ = ["FormTimes", "LatencyTable", "LayerTimes", "cache_folder", "latency_table", "random_factors"]
