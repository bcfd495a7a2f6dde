"""One file for each system that is measured; each is run by its own environment's python."""
