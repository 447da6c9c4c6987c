"""The benchmark: this stack compared with alternatives. See `python -m bench --help`."""
