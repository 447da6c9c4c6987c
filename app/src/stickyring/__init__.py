"""Sticky Socket.IO on your own machines: the node runtime, its echo service and the probe that proves a deployment."""
