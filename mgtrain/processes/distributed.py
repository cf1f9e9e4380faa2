"""The ranks of a run: start them, connect them, exchange tensors. The only module that uses torch.distributed.

Ranks read torchrun's variables: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import hashlib
import math
import os
import platform
import signal
import subprocess
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mgtrain.console import note, warn
from mgtrain.errors import MissingCapabilityError, RanksLostError, StoppedError, lack_of
from mgtrain.processes.cores import keep_freed_memory, usable_cores, which_cores
from mgtrain.processes.environment import LAUNCHER, has_gpus, is_launched, launcher, rank_of_environment, restarts
from mgtrain.processes.signals import ended_if_failed, leave_terminal, stop_signals
from mgtrain.processes.watchdog import Watchdog

Value = TypeVar("Value")
JOIN_MINUTES = 30  # timeout for all ranks to join, and the least for an exchange
MOST_HOURS = 24  # of an exchange without a watchdog: in an evaluation, a fast rank waits for a slow one
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the new name, where torch has it
Places = Sequence[tuple[str, set[int], str]]  # of each rank: the machine, the cores that it may use, cuda or cpu
SECONDS_TO_END = 20.0  # for the other ranks to end after one has failed


@dataclass(frozen=True, slots=True)
class World:
    """This process among the ranks of a run; by default the only one, for which exchanges return their input."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cores: int = field(default_factory=usable_cores)  # this rank's share of the machine's
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
        """The tensors of a block of `ranks` consecutive ranks, by default all: (ranks, *shape), detached."""
        ranks = ranks or self.size
        tensor = tensor.detach().contiguous()
        if ranks == 1:
            return tensor[None]
        gathered = tensor.new_empty(ranks, *tensor.shape)
        all_gather(gathered, tensor[None], group=_block(ranks, self.size, self.watchdog.seconds))
        return gathered

    def from_main(self, value: Value) -> Value:
        """The main rank's value, on every rank; it must be picklable."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def any(self, yes: bool) -> bool:
        """Whether any rank says yes."""
        return yes if self.size == 1 else bool(self.sum(torch.tensor(float(yes))).item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


class Agreement:
    """Tells all ranks before the same step that one of them has said yes, such as that it received a signal."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._under_way: tuple[dist.Work, Tensor] | None = None

    def __call__(self, yes: bool) -> bool:
        """Whether any rank said yes at the previous call; with one rank, at this call.

        The exchange runs on the CPU during the step between two calls, so nothing waits for a GPU.
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
def _block(ranks: int, size: int, timeout_seconds: float) -> dist.ProcessGroup | None:
    """The process group of this rank's block of `ranks` consecutive ranks; all ranks must call this together."""
    return None if ranks == size else dist.new_subgroups(ranks, timeout=_longest_exchange(timeout_seconds))[0]


def _longest_exchange(timeout_seconds: float) -> timedelta:
    """The timeout of an exchange, after that of the watchdog (`timeout_seconds`), which says more of a hang."""
    return timedelta(seconds=max(60 * JOIN_MINUTES, min(2 * timeout_seconds, 3600 * MOST_HOURS)))


@contextmanager
def connect(device: str | None = None, timeout_seconds: float = float("inf")) -> Iterator[World]:
    """Join the run that torchrun's variables describe, or run alone, under a watchdog.

    `device` is `cuda` or `cpu`; None: a GPU if the machine has one. Raises `MissingCapabilityError` if there is no GPU
    for this rank, and `RanksLostError` if another rank ends during an exchange.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingCapabilityError(
            "--device cuda: torch sees no GPU; use --device cpu, or install a CUDA build of torch"
        )
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        chosen = torch.device("cuda", _own_gpu(int(os.environ.get("LOCAL_RANK", 0))))
        torch.cuda.set_device(chosen)
        if is_launched() and "LOCAL_RANK" not in os.environ and (gpus := torch.cuda.device_count()) > 1:
            note(
                f"WORLD_SIZE is set, so this is one rank, on one of {gpus} GPUs; to use all, unset it, or start a rank "
                "for each with torchrun",
                "yellow",
            )
    else:
        keep_freed_memory()
        if device is None and rank_of_environment() == 0 and has_gpus():
            warn("torch does not see this machine's NVIDIA GPUs, so this runs on the CPU; `mgtrain doctor` says more")
    size = int(os.environ.get("WORLD_SIZE", 1))
    watchdog = Watchdog(timeout_seconds, rank_of_environment(), launcher())
    with watchdog.on_watch():
        if size == 1:
            watchdog.beat()
            yield World(device=chosen, watchdog=watchdog)
            return
        try:
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            timeout = timedelta(minutes=JOIN_MINUTES)
            store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
            store = _of_these_ranks(store, rank, size)
            if chosen.type == "cuda":
                _refuse_shared_gpu(store, chosen)
            longest = _longest_exchange(timeout_seconds)
            dist.init_process_group(backend, timeout=longest, store=store, rank=rank, world_size=size)
            watchdog.beat()
            everyone: list[Any] = [None] * size
            dist.all_gather_object(everyone, (platform.node(), which_cores(), chosen.type))
            _refuse_other_devices(everyone)
            try:
                with ended_if_failed(SECONDS_TO_END):
                    yield World(rank, size, chosen, _share_of_cores(rank, everyone), watchdog)
            except StoppedError:  # all ranks stop after the same step
                dist.destroy_process_group()
                raise
            dist.destroy_process_group()
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            if lack := lack_of(error):
                raise lack from None
            lines = (line for line in reversed(str(error).splitlines()) if not line.rstrip().endswith(":"))
            why = next(lines, type(error).__name__).rpartition("] ")[2][:200]
            if not dist.is_initialized():
                why += (
                    "; is MASTER_PORT free, and does each machine's name resolve to an address that the others reach? "
                    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose a network"
                )
            raise RanksLostError(
                f"rank {rank_of_environment()} of {size} lost its connection to another rank; see that rank's message "
                f"for the cause, then run again with --resume ({why})"
            ) from None


def _of_these_ranks(store: Any, rank: int, size: int) -> Any:
    """The part of a store that only the processes use which are ranks now; `RanksLostError` after `JOIN_MINUTES`.

    torchrun's agents keep the store while they restart ranks, and their counts of restarts differ. So each process
    writes a name of its own, rank 0 lists the names, and all go on when each process of the list has confirmed it,
    which one that has ended cannot.
    """
    store = dist.PrefixStore("mgtrain", store)  # type: ignore[attr-defined]
    mine, confirmed = uuid.uuid4().hex, ""
    store.set(f"rank/{rank}", mine)
    deadline = time.monotonic() + 60 * JOIN_MINUTES
    while time.monotonic() < deadline:
        if rank == 0:
            store.set("ranks", " ".join(store.get(f"rank/{other}").decode() for other in range(size)))
        listed = store.get("ranks").decode()
        ours = dist.PrefixStore(hashlib.sha256(listed.encode()).hexdigest(), store)  # type: ignore[attr-defined]
        if len(names := listed.split()) == size and names[rank] == mine:
            if listed != confirmed:
                ours.add("confirmed", 1)
                confirmed = listed
            if rank == 0 and ours.add("confirmed", 0) == size:
                ours.set("complete", "yes")
            if ours.check(["complete"]):
                return ours
        time.sleep(0.02 + size / 1000)  # many ranks ask more rarely
    raise RanksLostError(f"rank {rank} of {size}: the other ranks have not joined within {JOIN_MINUTES} minutes")


def _refuse_other_devices(everyone: Places) -> None:
    """Raise `MissingCapabilityError` if some machines have no GPU, as with a broken driver, and others have."""
    without = sorted({node for node, _, kind in everyone if kind == "cpu"})
    if without and any(kind != "cpu" for *_, kind in everyone):
        raise MissingCapabilityError(
            f"torch sees no GPU on {', '.join(without)}, but on other machines; repair the driver there, or use "
            "--device cpu"
        )


def joined(device: torch.device | str | None = None, together: bool = False) -> World:
    """This process among the ranks of a process group that somebody else has initialized; alone if there is none.

    `device` None: the current GPU, or the CPU where there is none. If all ranks call this `together`, each learns its
    share of its machine's cores.
    """
    if device is None:
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    if not dist.is_initialized():
        return World(device=torch.device(device))
    rank, size, cores = dist.get_rank(), dist.get_world_size(), 1
    if together:
        everyone: list[Any] = [None] * size
        dist.all_gather_object(everyone, (platform.node(), which_cores(), torch.device(device).type))
        cores = _share_of_cores(rank, everyone)
    return World(rank, size, torch.device(device), cores)


def _share_of_cores(rank: int, everyone: Places) -> int:
    """The cores of a rank, where a core of several ranks counts as a fraction for each of them.

    So the share is the same whether a launcher binds each rank to cores of its own (SLURM, numactl) or not (torchrun).
    """
    node, mine, _ = everyone[rank]
    users = Counter(core for there, cores, _ in everyone if there == node for core in cores)
    return max(1, int(sum(Fraction(1, users[core]) for core in mine)))


def _own_gpu(local_rank: int) -> int:
    """The GPU of this process: that of its local rank, or the only visible one (Slurm's `--gpus-per-task=1`)."""
    gpus = torch.cuda.device_count()
    if local_rank < gpus:
        return local_rank
    if gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0
    raise MissingCapabilityError(f"{local_rank + 1} processes, but {gpus} GPUs here; start one process per GPU")


def _refuse_shared_gpu(store: Any, device: torch.device) -> None:
    """Raise `MissingCapabilityError` if another rank uses the same GPU, which NCCL reports unclearly."""
    gpu = torch.cuda.get_device_properties(device)
    if store.add(f"gpu/{gpu.uuid}", 1) > 1:
        raise MissingCapabilityError(
            f"rank {rank_of_environment()} uses the same GPU ({gpu.name}) as another rank; start one process per GPU"
        )


def says_first(message: str) -> bool:
    """Whether this rank is the first to print this message, so that an error of all ranks is printed once."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True  # the launcher has no store to ask
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    key = f"said/{restarts()}/{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        store = dist.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))  # type: ignore[attr-defined]
        return int(store.add(key, 1)) == 1
    except RuntimeError:  # the launcher is gone
        return True


def default_procs(device: str | None) -> int:
    """The default number of processes: one per visible GPU."""
    return max(1, torch.cuda.device_count()) if device != "cpu" and torch.cuda.is_available() else 1


def launch(command: Sequence[str], procs: int) -> int:
    """Run a command in `procs` processes on this machine, as torchrun would; returns the first failure's exit code.

    The `stop_signals` are forwarded to all of them. After one fails, the others have `SECONDS_TO_END` to end;
    after a second SIGINT, which a rank in an exchange does not notice, all have a second.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]  # on a free port
    shared = {
        "WORLD_SIZE": procs,
        "LOCAL_WORLD_SIZE": procs,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # the ranks connect through the store above
        "TORCHELASTIC_RESTART_COUNT": 0,
        LAUNCHER: os.getpid(),
        # Report a lost rank in one line, without the stack of every failed exchange.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "FATAL"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, usable_cores() // procs)),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    interrupts: list[int] = []

    def forward(number: int, _: object) -> None:
        interrupts.extend([number] if number == signal.SIGINT else [])
        if number == signal.SIGHUP:
            leave_terminal()
        for process in ranks:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        for rank in range(procs):
            own = {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            # In a new session, so that the terminal's Ctrl-C reaches them only through this process.
            ranks.append(subprocess.Popen(command, env=os.environ | own, start_new_session=True))
        return _wait_for(ranks, lambda: len(interrupts) > 1)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for(ranks: Sequence[subprocess.Popen[bytes]], hurried: Callable[[], bool]) -> int:
    """Wait until all ranks end, or `SECONDS_TO_END` after a failure; returns the first failure's exit code, or 0."""
    failed_at = hurried_at = math.inf
    while None in (codes := [process.poll() for process in ranks]):
        now = time.monotonic()
        failed_at = min(failed_at, now) if any(codes) else failed_at
        hurried_at = min(hurried_at, now) if hurried() else hurried_at
        if now > min(failed_at + SECONDS_TO_END, hurried_at + 1):
            break
        time.sleep(0.05)
    for rank, process in enumerate(ranks):
        if (code := process.returncode or 0) < 0 and code != -signal.SIGALRM:  # that of `ended_if_failed`
            why = "; the system does so if memory runs out" if code == -signal.SIGKILL else ""
            note(f"mgtrain: rank {rank} was ended by {signal.Signals(-code).name}{why}", "red")
    if None in codes and not any(codes):
        return 128 + signal.SIGINT
    failed = [process.returncode for process in ranks if process.returncode]
    # `RanksLostError` is a consequence of another rank's failure.
    late = RanksLostError.exit_code, -signal.SIGALRM
    first = next((code for code in failed if code not in late), failed[0] if failed else 0)
    return first if first >= 0 else 128 - first


def replicate(model: nn.Module, world: World, all_used: bool = True) -> nn.Module:
    """The model with gradients averaged over the ranks; buffers stay local (see `merge_group_stats`).

    Unless `all_used`, some parameters may not take part in the forward pass.
    """
    if world.size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    # Meaningless: the strides of 1 x 1 x 1 kernels are valid in both memory formats.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")  # and all are used
    # Copy gradients into a bucket with one kernel, not with one for each; torch before 2.14 cannot.
    known = signature(DistributedDataParallel).parameters
    batched: dict[str, Any] = {"batched_grad_copy": True} if "batched_grad_copy" in known else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `broadcast_buffers` will be renamed
        replica = DistributedDataParallel(
            model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True,
            find_unused_parameters=not all_used, **batched,
        )  # fmt: skip
    replica._set_ddp_runtime_logging_sample_rate(2**31 - 1)  # type: ignore[no-untyped-call]  # which waits for the GPU
    return replica


def no_sync(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Keep gradients local in all micro-batches but the last."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def unwrap(model: nn.Module) -> nn.Module:
    """The model without the wrapper of `replicate`."""
    return model.module if isinstance(model, DistributedDataParallel) else model
