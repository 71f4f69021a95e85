"""The keys of an experiment file: type, default, limits and help text of each.

A config is read and checked once, before anything else of a run is loaded. The package imports
neither PyTorch nor any other part of fedprompt that builds on it.
"""
