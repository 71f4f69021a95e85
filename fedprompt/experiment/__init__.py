"""From an experiment file to a finished run folder."""
