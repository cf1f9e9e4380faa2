"""Before a run: check the machine and the videos, estimate the cost of training, prepare videos, propose recipes.

It takes a recipe and its videos, and returns findings, estimates, prepared sets and proposed recipes. Nothing here
changes the original videos or a run.
"""
