"""What every room needs: errors, files that are whole or absent, plans as values, running a model without a trace."""
