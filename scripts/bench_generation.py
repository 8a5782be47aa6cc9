"""`python -m specdec bench` as a file: whole generations against `model.generate`."""

import sys

from specdec.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
