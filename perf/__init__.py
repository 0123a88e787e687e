"""What training costs, measured: `python -m perf --help`."""
