"""The training loop and its parts: set-up, step, evaluation, recalibration, resuming.

It takes a recipe, a run's folder and this process's rank, and returns a trained network and its scores. Results must
not depend on the time, on the number of workers, or on state that a resumed run does not have.
"""
