"""`python -m mgtrain`, and so `torchrun -m mgtrain`."""

from mgtrain.cli import main

main()
