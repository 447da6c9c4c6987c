"""`stickyring status`: the state of the fleet in a terminal, or as JSON."""
