"""Adapt a run to the machine: micro-batches that fit its memory, and the fastest convolutions.

It takes a recipe, a plan and a device, and returns the recipe with micro-batches and a network ready for its first
step. Nothing here changes the clips of a step, or its losses beyond rounding.
"""
