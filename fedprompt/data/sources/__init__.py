"""Where images and class names come from. Every module here is one data source."""
