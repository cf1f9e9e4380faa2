"""From videos to mini-batches: which clip comes when, how it is cut and decoded, and how it reaches the device.

In come videos and the steps of a plan, out go uint8 pixels (b, 3, T, S, S) and labels. A clip depends on its request
and the seed alone, never on the process that makes it; nothing here knows the network.
"""
