"""Running an experiment: from its file to a finished run folder."""
