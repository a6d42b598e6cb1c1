"""``python -m dynskip``."""

import sys

from dynskip.cli import main

if __name__ == "__main__":
    sys.exit(main())
