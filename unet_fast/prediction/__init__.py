"""Prediction of scores, probabilities, labels or objects, tile by tile."""
