"""Training and evaluation: checks, optimizer, step, recalibration, evaluation, and the loop in `fit`."""
