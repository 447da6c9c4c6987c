"""`stickyring plan`: how many users a membership change will move, and where."""
