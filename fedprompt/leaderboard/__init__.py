"""Result files from anyone, checked and merged into one ranking with its significance."""
