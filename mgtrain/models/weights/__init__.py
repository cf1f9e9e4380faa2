"""Weights from elsewhere: files of other projects, read without running them, under our names and in our shapes."""
