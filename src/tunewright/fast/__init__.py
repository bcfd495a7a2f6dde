"""Speed techniques: each can be switched off, each is proven equal to the plain path."""
