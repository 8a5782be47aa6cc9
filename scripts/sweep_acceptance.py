"""`python -m specdec sweep` as a file, for `accelerate launch`."""

import sys

from specdec.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
