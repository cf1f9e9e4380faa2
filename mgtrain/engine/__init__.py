"""The loop, and everything that a step of it does: set-up, step, evaluation, recalibration, resuming.

In come a recipe, a run's folder and a place among the ranks, out go a trained network and its scores. The step's number
is the clock: nothing here may depend on the time, on the number of workers, or on anything that a resumed run lacks.
"""
