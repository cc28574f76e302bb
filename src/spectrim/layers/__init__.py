"""Layers and what stands in for them: types, units, forms; selecting, replacing, counting, saving."""
