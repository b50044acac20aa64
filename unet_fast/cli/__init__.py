"""The command line. What a command works with is imported in it, so that help comes at once."""

from . import pictures, prediction, training  # each adds its commands
from .entry import app, main

__all__ = ["app", "main", "pictures", "prediction", "training"]
