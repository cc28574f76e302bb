"""Latency: what every layer takes in every form on this machine and runtime, and what a whole network then takes."""

from spectrim.benchmark.latency.cache import cache_folder
from spectrim.benchmark.latency.making import latency_table
from spectrim.benchmark.latency.table import FormTimes, LatencyTable, LayerTimes
from spectrim.benchmark.latency.trial import random_factors

__all__ = ["FormTimes", "LatencyTable", "LayerTimes", "cache_folder", "latency_table", "random_factors"]
