"""What is known of a trained network: statistics of its inputs, spectra, and the sensitivity of each layer."""
