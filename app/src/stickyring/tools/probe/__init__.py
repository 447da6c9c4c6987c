"""`stickyring probe`: real Socket.IO sessions that prove a deployment sticky, or show why it is not."""
