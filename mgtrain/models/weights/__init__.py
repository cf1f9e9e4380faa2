"""Load weights, also those of other projects: read the file, convert names and shapes, report what matched.

Nothing in a file is executed.
"""
