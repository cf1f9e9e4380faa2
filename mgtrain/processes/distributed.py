"""The processes of a run: who they are, what they exchange, how they start. The only user of torch.distributed.

torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) are read, never
invented.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mgtrain.errors import MissingCapabilityError, RanksLostError
from mgtrain.processes.cores import keep_freed_memory
from mgtrain.processes.watchdog import Watchdog

Value = TypeVar("Value")
MINUTES_TO_MEET = 30  # until all ranks of a run must have joined
LAUNCHER = "MGTRAIN_LAUNCHER"  # the variable that tells ranks its process id
SECONDS_TO_END = 20.0  # that the ranks have once another one has failed


@dataclass(frozen=True, slots=True)
class World:
    """This process among the ranks of a run. Alone by default; the exchanges below are then the identity."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_size: int = 1  # ranks on this machine
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(float("inf")))

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

    def from_main(self, value: Value) -> Value:
        """The main rank's value, which can be pickled."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values)
        main: Value = values[0]
        return main

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.barrier()


class Agreement:
    """A question that any rank may answer with yes at any time; all ranks learn of it before the same step."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._under_way: tuple[dist.Work, Tensor] | None = None

    def __call__(self, yes: bool) -> bool:
        """Whether any rank had said yes at the call before this one; alone: at this one.

        What is said travels while the step between two calls is computed, on the CPU: nothing waits for a GPU.
        """
        if self._world.size == 1:
            return yes
        agreed = False
        if self._under_way is not None:
            work, answers = self._under_way
            work.wait()
            agreed = bool(answers.item())
        answers = torch.tensor(float(yes))
        self._under_way = dist.all_reduce(answers, dist.ReduceOp.MAX, async_op=True), answers
        return agreed


@lru_cache
def _block(ranks: int, size: int) -> dist.ProcessGroup | None:
    """The process group of this rank's block of `ranks` consecutive ranks; made by all ranks together."""
    return None if ranks == size else dist.new_subgroups(ranks)[0]


@contextmanager
def connect(device: str | None = None, timeout_seconds: float = float("inf")) -> Iterator[World]:
    """Join the run that torchrun's variables describe, or be alone; under a watchdog.

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
    if chosen.type == "cpu":
        keep_freed_memory()
    size = int(os.environ.get("WORLD_SIZE", 1))
    watchdog = Watchdog(timeout_seconds, rank_of_environment(), _launcher())
    with watchdog.on_watch():
        if size == 1:
            watchdog.beat()
            yield World(device=chosen, watchdog=watchdog)
            return
        with _lost_ranks_named(size):
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            timeout = timedelta(minutes=MINUTES_TO_MEET)
            store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
            # The store outlives ranks that torchrun starts again, and with it the addresses of the ones that are gone.
            store = dist.PrefixStore(f"attempt_{_restarts()}", store)  # type: ignore[attr-defined]
            dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
            watchdog.beat()
            yield World(rank, size, chosen, int(os.environ.get("LOCAL_WORLD_SIZE", size)), watchdog)
            dist.destroy_process_group()


@contextmanager
def _lost_ranks_named(size: int) -> Iterator[None]:
    """Say that another rank is gone, where that is why an exchange failed."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RanksLostError(
            f"rank {rank_of_environment()} of {size} lost another rank, whose message says why; run again with --resume"
        ) from None


def _launcher() -> int | None:
    """The process that started this rank; none if it is not one of several."""
    if not is_launched():
        return None
    return int(os.environ.get(LAUNCHER, os.getppid()))


def is_launched() -> bool:
    """Whether torchrun (or `launch`) started this process."""
    return "WORLD_SIZE" in os.environ


def rank_of_environment() -> int:
    """This process's rank, before it is connected to the others."""
    return int(os.environ.get("RANK", 0))


def is_restarted() -> bool:
    """Whether torchrun started the ranks again after one had failed."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def says_first(message: str) -> bool:
    """Whether this rank is the first of its run to say this: a mistake that all ranks come to is printed once."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True  # nobody to ask: the launcher has the store at which ranks meet
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    key = f"said/{_restarts()}/{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        store = dist.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))  # type: ignore[attr-defined]
        return int(store.add(key, 1)) == 1
    except RuntimeError:  # the launcher is gone
        return True


def default_procs(device: str | None) -> int:
    """Processes to start when the user does not say: one for each visible GPU."""
    return max(1, torch.cuda.device_count()) if device != "cpu" and torch.cuda.is_available() else 1


def launch(command: Sequence[str], procs: int) -> int:
    """Run a command in `procs` processes on this machine, as torchrun would; returns the first failure's exit code.

    SIGTERM, SIGINT and SIGUSR1 are passed on to all of them. Once one has failed, the others have `SECONDS_TO_END`.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]  # on a free port
    shared = {
        "WORLD_SIZE": procs,
        "LOCAL_WORLD_SIZE": procs,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # the ranks meet at the store above
        "TORCHELASTIC_RESTART_COUNT": 0,
        LAUNCHER: os.getpid(),
        # What a lost rank means is said in one line, without the stack of every exchange that failed.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "FATAL"),
    }
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        shared["OMP_NUM_THREADS"] = max(1, (os.cpu_count() or 1) // procs)
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        for process in ranks:
            process.send_signal(number)

    passed_on = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, pass_on) for number in passed_on}
    try:
        for rank in range(procs):
            own = {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            # Of a session of their own, so that the terminal's Ctrl-C reaches them once.
            ranks.append(subprocess.Popen(command, env=os.environ | own, start_new_session=True))
        return _wait_for(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """The first failure's exit code, or 0, when all have ended or had their time."""
    deadline = float("inf")
    while None in (codes := [process.poll() for process in ranks]) and time.monotonic() < deadline:
        if deadline == float("inf") and any(codes):
            deadline = time.monotonic() + SECONDS_TO_END
        time.sleep(0.05)
    failed = [process.returncode for process in ranks if process.returncode]
    # A rank that lost another one fails as well, within moments of it.
    first = next((code for code in failed if code != RanksLostError.exit_code), failed[0] if failed else 0)
    return first if first >= 0 else 128 - first


def replicate(model: nn.Module, world: World) -> nn.Module:
    """The model with gradients averaged over the ranks. Buffers stay each rank's own: see `merge_group_stats`."""
    if world.size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    # Kernels of 1 x 1 x 1 are of either memory format, so their strides tell nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `broadcast_buffers` gets another name
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def no_sync(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Keep gradients local in all micro-batches but the last."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without the replication around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model
