"""The command line. Commands import what they need when they run, so that help comes at once."""

import gc

gc.freeze()  # torch stays loaded: garbage collections need not search it, now and later

from . import export, info, nnunet, pictures, prediction, training  # noqa: E402  each adds its commands
from .entry import app, main  # noqa: E402

__all__ = ["app", "export", "info", "main", "nnunet", "pictures", "prediction", "training"]
