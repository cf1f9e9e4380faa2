"""The training loop and its parts: set-up, step, evaluation, recalibration, resuming.

Results must not depend on the time, on the number of workers, or on state that a resumed run does not have.
"""
