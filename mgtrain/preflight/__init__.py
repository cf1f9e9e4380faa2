"""What to ask before a run: can this machine train, are the videos usable, what will training cost.

In come a recipe, its videos and this machine; out go findings, estimates, prepared sets and proposed recipes. Nothing
here changes the videos or a run.
"""
