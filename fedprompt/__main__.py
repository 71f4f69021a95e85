"""`python -m fedprompt` is the `fedprompt` command."""

from fedprompt.cli import main

main()
