"""Every key of an experiment: its type, default, limits and help."""
