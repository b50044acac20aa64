"""Entry point of `python -m unet_fast`."""

import sys

from .cli import main

sys.exit(main())
