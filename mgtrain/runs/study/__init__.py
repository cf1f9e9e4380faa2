"""Studies: compare variants of a recipe over several seeds or folds.

It takes a YAML file and makes runs, a small result file for each, and a page with intervals and verdicts.
"""
