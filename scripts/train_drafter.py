"""`python -m specdec train` as a file: trains a drafter on text that the model writes itself."""

import sys

from specdec.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
