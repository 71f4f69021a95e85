"""Image features: encoded once by the frozen image tower, cached on disk, read as tables.

Clients and the server open a `FeatureTable` (`table`) before the first round. Its columns are files
of the feature cache (`cache`), each of which holds one `Encoding` (`encoding`) of a data set. A
training step or an evaluation then takes rows of the table as `Inputs` (`inputs`).
"""
