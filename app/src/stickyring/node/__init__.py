"""What runs on a node: gunicorn with a worker of its own, around the application that is deployed."""
