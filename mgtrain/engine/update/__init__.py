"""How a step changes the weights: the optimizer over groups of parameters, and the moving average of the weights."""
