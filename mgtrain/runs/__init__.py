"""A run on disk: its folder, checkpoints, logs and scores, and what they say when runs are compared.

In come steps, evaluations and tensors, out go files, tables, verdicts and an HTML report. Nothing here trains or
decodes, and a file is written whole or not at all.
"""
