"""From annotated images to a network."""
