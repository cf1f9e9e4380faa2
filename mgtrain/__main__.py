"""`python -m mgtrain`, and so `torchrun -m mgtrain`."""

import os
import sys

if __name__ == "__main__":  # not where a loader process imports it
    if not getattr(sys.flags, "safe_path", False) and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]  # the current folder: its files must not replace installed modules
    from mgtrain.cli import main

    main()
