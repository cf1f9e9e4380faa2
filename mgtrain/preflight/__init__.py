"""What one asks before a run: can this machine train, are the videos usable, what will it cost.

In come a recipe, the videos and this machine, out go findings, measurements, estimates and proposed recipes. Nothing
here changes the videos or a run.
"""
