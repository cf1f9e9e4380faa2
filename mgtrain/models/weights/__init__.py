"""Weights from elsewhere: in come files of other projects and a network, out go loaded tensors and a report of what
matched, under our names and in our shapes. Nothing in a file is executed.
"""
