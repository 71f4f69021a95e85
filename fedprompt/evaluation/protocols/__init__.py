"""One evaluation protocol per file."""
