"""From an image to scores, probabilities, labels or objects, tile by tile."""
