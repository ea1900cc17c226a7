"""`python -m workerd`: the same as the command `workerd`."""

import sys

from workerd.cli import main

if __name__ == "__main__":
    sys.exit(main())
