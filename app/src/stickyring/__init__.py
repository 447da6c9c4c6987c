"""Sticky Socket.IO on your own machines: the node runtime, the echo service and the operator's commands."""
