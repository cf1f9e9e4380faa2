"""A run on disk: its folder, checkpoints, logs and scores, and comparisons of runs.

It takes steps, evaluations and tensors, and returns files, tables, verdicts and an HTML report. Nothing here trains or
decodes, and files are written atomically.
"""
