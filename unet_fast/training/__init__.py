"""Training of a network on annotated images."""
