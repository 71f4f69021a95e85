"""From run folders to tables, figures and HTML pages."""
