"""`python -m unet_fast.cli`, as torchrun wants it."""

import sys

from . import main

sys.exit(main())
