"""The processes of a run: who they are, what they exchange, how they start. The only user of torch.distributed.

torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) are read, never
invented.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mgtrain.errors import MissingCapabilityError


@dataclass(frozen=True, slots=True)
class World:
    """This process among the ranks of a run. Alone by default; the exchanges below are then the identity."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_size: int = 1  # ranks on this machine

    @property
    def main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor, ranks: int | None = None) -> Tensor:
        """The tensors of this rank's block of `ranks` consecutive ranks, all by default: (ranks, *shape), detached."""
        ranks = ranks or self.size
        tensor = tensor.detach().contiguous()
        if ranks == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(ranks)]
        dist.all_gather(parts, tensor, group=_block(ranks, self.size))
        return torch.stack(parts)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.barrier()


@lru_cache
def _block(ranks: int, size: int) -> dist.ProcessGroup | None:
    """The process group of this rank's block of `ranks` consecutive ranks; made by all ranks together."""
    return None if ranks == size else dist.new_subgroups(ranks)[0]


@contextmanager
def connect(device: str | None = None) -> Iterator[World]:
    """Join the run that torchrun's variables describe, or be alone.

    `device` is `cuda` or `cpu`; none given: a GPU if the machine has one.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingCapabilityError(
            "--device cuda: torch sees no GPU; use --device cpu, or install a CUDA build of torch"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise MissingCapabilityError(
                f"{local_rank + 1} processes here but {torch.cuda.device_count()} GPUs; start one for each GPU"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World(device=chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    try:
        yield World(dist.get_rank(), size, chosen, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    finally:
        dist.destroy_process_group()


def is_launched() -> bool:
    """Whether torchrun (or `launch`) started this process."""
    return "WORLD_SIZE" in os.environ


def default_procs(device: str | None) -> int:
    """Processes to start when the user does not say: one for each visible GPU."""
    return max(1, torch.cuda.device_count()) if device != "cpu" and torch.cuda.is_available() else 1


def launch(command: Sequence[str], procs: int) -> int:
    """Run a command in `procs` processes on this machine, as torchrun would; returns the first failure's exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the ranks say themselves what went wrong
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // procs)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=procs,
        run_id="mgtrain",  # torch warns where there is none
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def replicate(model: nn.Module, world: World) -> nn.Module:
    """The model with gradients averaged over the ranks. Buffers stay each rank's own: see `merge_group_stats`."""
    if world.size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def no_sync(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Keep gradients local in all micro-batches but the last."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without the replication around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model
