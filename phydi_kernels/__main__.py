"""``python -m phydi_kernels``: the same as the command ``phydi-kernels``."""

import sys

from .cli import main

sys.exit(main())
