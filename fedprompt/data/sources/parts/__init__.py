"""Parts of data sources: readers of folders and of the hub, and the check of all images."""
