"""The data sources, which open images and read class names. Every module is one source."""
