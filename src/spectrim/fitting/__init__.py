"""Fitting factored layers to a dense network's outputs, layer after layer."""
