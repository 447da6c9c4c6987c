"""A node for ASGI applications: what `stickyring.node` does on eventlet, on asyncio."""
