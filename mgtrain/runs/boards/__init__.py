"""Where a run shows its curves: TensorBoard always, Weights & Biases and MLflow if the recipe names them.

Each is a `Board`. TensorBoard writes to the run's folder, so its errors are errors of the run. The others are services
that may be slow, unreachable or broken: each runs in its own process (`relay.py`) and cannot stop or delay the run.
"""
