"""`python -m lmray` is the command `lmray`."""

from lmray.cli import main

main()
