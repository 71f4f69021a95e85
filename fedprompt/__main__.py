"""`python -m fedprompt` is the `fedprompt` command."""

from fedprompt.cli.main import main

main()
