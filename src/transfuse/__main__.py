"""`python -m transfuse`: the command line, as torchrun starts it."""

from .cli import main

main()
