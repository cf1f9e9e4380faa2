"""`python -m mgtrain`, and so `torchrun -m mgtrain`."""

from mgtrain.cli import main

if __name__ == "__main__":  # not where a loader process imports it
    main()
