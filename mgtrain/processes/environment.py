"""torchrun's environment variables, read without importing torch."""

import os


def is_launched() -> bool:
    """Whether torchrun (or `launch`) started this process."""
    return "WORLD_SIZE" in os.environ


def rank_of_environment() -> int:
    """This process's rank; known before the ranks are connected."""
    return int(os.environ.get("RANK", 0))


def restarts() -> int:
    """How often this machine's torchrun has restarted the ranks after a failure; others may count differently."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def may_restart() -> bool:
    """Whether torchrun restarts the ranks after a failure; on a new machine they cannot tell that it has."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
