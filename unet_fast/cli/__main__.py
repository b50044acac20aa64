"""Entry point of `python -m unet_fast.cli`, the form that torchrun needs."""

import sys

from . import main

sys.exit(main())
