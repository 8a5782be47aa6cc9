"""The commands of `python -m specdec`, one module each; `specdec.cli` lists them."""
