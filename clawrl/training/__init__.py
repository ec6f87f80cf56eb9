"""Training: the buffer, the trainer that empties it, and the versions it makes."""
