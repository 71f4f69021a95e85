"""The `fedprompt` command, with one module per group of subcommands."""
