"""From videos to mini-batches: the order of the clips, how each is cut, decoding, and loading."""
