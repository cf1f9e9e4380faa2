"""The processes of a run: ranks, loader processes, and processes that may crash.

It reads torchrun's variables, or starts a number of processes, and returns a `World`: this process's rank and its
exchanges with the others. Only `distributed` uses torch.distributed. `files` writes files that a killed process leaves
whole. Nothing here knows recipes, clips or networks.
"""
