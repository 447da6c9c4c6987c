"""What runs on a node: gunicorn with our own worker, around the deployed application."""
