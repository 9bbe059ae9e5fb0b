"""`python -m fastsel`."""

from __future__ import annotations

import sys

from fastsel.cli import main

if __name__ == "__main__":
    sys.exit(main())
