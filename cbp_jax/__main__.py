"""The command `cbp-jax` as `python -m cbp_jax`."""

import sys

from cbp_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
