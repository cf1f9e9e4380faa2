"""From videos to mini-batches: the order of clips, cutting, decoding, and the way to the device.

The input is videos and the steps of a plan, the output uint8 pixels (b, 3, T, S, S) and labels. A clip depends only on
its request and the seed, never on the process that loads it. Nothing here depends on the network.
"""
