"""`python -m diffussm`: the console script `diffussm`."""

import sys

from diffussm.cli import main

if __name__ == "__main__":
    sys.exit(main())
