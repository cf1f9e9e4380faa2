"""The annotation formats, one file each.

The input is a folder and its annotations, as published or as people write them; the output is `Videos`. A format never
opens a video. An error about an invalid row names its file and line.
"""
