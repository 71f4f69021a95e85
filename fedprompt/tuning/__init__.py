"""`fedprompt tune`: the same budget of search on validation data for every method of a table."""
