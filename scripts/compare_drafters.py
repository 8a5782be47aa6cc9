"""`python -m specdec compare` as a file: every drafter against plain generation."""

import sys

from specdec.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
