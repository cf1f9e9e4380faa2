"""The processes of a run: ranks, loader processes, and processes that may crash.

In come torchrun's variables or a number of processes, out goes a `World`: who this process is and what it exchanges
with the others. Only `distributed` talks to torch.distributed. Nothing here knows recipes, clips or networks.
"""
