"""`python -m modeling_udon.cli <verb>`, the same as `udon <verb>`."""

import sys

from modeling_udon.cli import main

if __name__ == "__main__":
    sys.exit(main())
