"""The benchmark: this stack beside what one would take instead. `python -m bench --help` tells how."""
