"""Adapt a run to the machine without changing its clips, or its losses beyond rounding."""
