"""What torchrun's variables and the driver of GPUs say, without importing torch."""

import os

LAUNCHER = "MGTRAIN_LAUNCHER"  # the process id of mgtrain's own launcher
NVIDIA = "/proc/driver/nvidia/gpus"  # the driver's list of its GPUs


def launcher() -> int | None:
    """The process id of mgtrain's launcher, or of torchrun's agent, which starts ranks itself; None: neither."""
    own, of_torchrun = os.environ.get(LAUNCHER), "TORCHELASTIC_RUN_ID" in os.environ
    return int(own) if own else os.getppid() if of_torchrun else None


def is_launched() -> bool:
    """Whether this process is one rank: torchrun or `launch` started it, or somebody set torchrun's variables."""
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


def has_gpus() -> bool:
    """Whether the machine has NVIDIA GPUs, unless `CUDA_VISIBLE_DEVICES` hides them."""
    return os.path.isdir(NVIDIA) and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
