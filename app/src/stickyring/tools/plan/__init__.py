"""`stickyring plan`: what a change of membership does to the users, before it is made."""
