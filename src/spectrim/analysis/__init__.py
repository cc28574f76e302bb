"""What is known of a trained network: its inputs' statistics, spectra, and how much each layer matters."""
