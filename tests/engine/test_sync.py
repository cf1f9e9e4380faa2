"""A training step asks nothing of the device that the host would have to wait for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import nullgpu
import pytest
import torch
from operations import Operations
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mgtrain.engine.checks import make_model
from mgtrain.engine.step import parts, to_device, train_step
from mgtrain.engine.update.optim import make_optimizer
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.schedule import make_plan

# What copies a number from the device to the host, or has as many results as the numbers say.
WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2")


def waits(operations: Operations) -> list[str]:
    """Those after which a host would wait for a GPU."""
    return [name for name in operations.names if name in WAITS]


def test_what_waits_is_seen() -> None:
    with Operations() as operations:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert waits(operations) == ["_local_scalar_dense", "nonzero"]


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("augment={brightness: 0.4, hue: 0.1, erase: 0.5, mixup: 0.8, label_smoothing: 0.1}",),
        ("hardware.micro_clips=4",),
    ],
    ids=["plain", "augmented", "micro-batches"],
)
def test_a_step_does_not_wait(changes: tuple[str, ...], tiny: Callable[..., Recipe]) -> None:
    recipe, world = tiny(*changes), World()
    plan = make_plan(recipe, 24)
    model = to_device(make_model(recipe), recipe, world)
    optimizer = make_optimizer(model, recipe.optim)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in (plan[0], plan[1], plan[len(plan) - 1]):  # the first of a phase makes room for its groups' statistics
        shape = step.shape
        clips = torch.zeros(shape.clips, 3, shape.frames, shape.crop, shape.crop, dtype=torch.uint8)
        with Operations() as operations:
            train_step(
                model, optimizer, scaler, clips, torch.zeros(shape.clips, dtype=torch.int64), step, recipe, world
            )
        assert waits(operations) == []


class Arrivals(TorchDispatchMode):
    """Notes what is copied from the host to a device of no memory, where reading a number is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bool]] = []  # the operation, and whether the host goes on meanwhile

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        given = [x for x in args if isinstance(x, Tensor)]
        if isinstance(made, Tensor) and made.device.type == "meta" and any(x.device.type == "cpu" for x in given):
            waits = not (
                kwargs.get("non_blocking") or (func.overloadpacket.__name__ == "copy_" and args[2:] == (True,))
            )
            self.found.append((func.overloadpacket.__name__, not waits))
        return made


def test_what_is_copied_to_a_device_is_seen() -> None:
    with Arrivals() as arrivals:
        torch.ones(3).to("meta")
        torch.ones(3).to("meta", non_blocking=True)
        torch.ones(3, device="meta").copy_(torch.ones(3))
    assert arrivals.found == [("_to_copy", False), ("_to_copy", True), ("copy_", False)]


AUGMENTED = (
    "augment={brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1, erase: 0.5, mixup: 0.8, cutmix: 1, "
    "label_smoothing: 0.1}"
)
NETWORKS = ("i3d_r50", "i3d_nln_r50", "slowfast_r50", "r2plus1d_18", "swin3d_t")


@pytest.mark.parametrize("model", NETWORKS)
def test_all_that_a_pass_draws_goes_to_the_device_in_one_copy(
    model: str, tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device of no memory stands in for a GPU: torch has neither autocast, fused SGD nor foreach there."""
    monkeypatch.setattr("mgtrain.engine.step.autocast", lambda *_: nullcontext())
    monkeypatch.setattr("mgtrain.engine.step.not_finite", lambda loss, *_: torch.zeros_like(loss))
    small = "" if model in ("r2plus1d_18", "swin3d_t") else ", width: 8, depth: [1, 1, 1, 1]"
    world = World(device=torch.device("meta"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for changes, copies in (((), 0), ((AUGMENTED, "hardware={micro_clips: 4, recompute: true}"), 1)):
        recipe = tiny(f"model={{name: {model}{small}}}", *changes)
        plan = make_plan(recipe, 24)
        with world.device:
            network = make_model(recipe)
        optimizer = torch.optim.SGD([{"params": network.parameters(), "lr_factor": 1.0}], lr=0.1)
        monkeypatch.setattr(optimizer, "step", lambda: None)
        shape = plan[0].shape
        clips = torch.empty(shape.clips, 3, shape.frames, shape.crop, shape.crop, dtype=torch.uint8, device="meta")
        labels = torch.empty(shape.clips, dtype=torch.int64, device="meta")
        passes = len(list(parts(plan[0], recipe, world)))
        with Arrivals() as arrivals:
            train_step(network, optimizer, scaler, clips, labels, plan[0], recipe, world)
        assert arrivals.found == [("_to_copy", True)] * copies * passes


ON_NULL_GPU = """
import sys
import nullgpu
import torch
from mgtrain.engine.checks import make_model
from mgtrain.engine.update.optim import make_optimizer
from mgtrain.engine.step import to_device, train_step
from mgtrain.models.fused.norm import works
from mgtrain.processes.distributed import World
from mgtrain.recipe import load_recipe
from mgtrain.schedule import make_plan

nullgpu.set_up()
recipe, gpu = load_recipe(sys.argv[1], sys.argv[2:]), World(device=torch.device("cuda", 0))
works(gpu.device)  # waits, once in a process: in a run before the first step
model = to_device(make_model(recipe), recipe, gpu)
optimizer, scaler = make_optimizer(model, recipe.optim), torch.amp.GradScaler("cuda", enabled=False)
for shape, step in make_plan(recipe, 1000).first_steps().items():
    clips = torch.zeros(shape.clips, 3, shape.frames, shape.crop, shape.crop, dtype=torch.uint8, device="cuda")
    labels = torch.zeros(shape.clips, dtype=torch.int64, device="cuda")
    for turn in range(2):  # the second shows a step whose tensors are all there
        torch.cuda.reset_peak_memory_stats()
        with nullgpu.counted() as asked:
            train_step(model, optimizer, scaler, clips, labels, step, recipe, gpu)
        print(str(shape), step.bn_groups, asked.waits, asked.pageable, asked.launches,
              torch.cuda.max_memory_allocated() / 2**30)
"""


needs_null_gpu = pytest.mark.skipif(nullgpu.why_not() is not None, reason=str(nullgpu.why_not()))


@pytest.mark.slow
@needs_null_gpu
def test_what_a_null_gpu_is_asked_is_counted(null_gpu: Callable[..., str]) -> None:
    program = """
import nullgpu, torch
with nullgpu.counted() as asked:
    x = torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    torch.ones(3).to("cuda", non_blocking=True)
    y = x + x
    y.sum().item()
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
print(asked.launches, asked.waits, asked.arrivals, asked.pageable)
"""
    assert null_gpu(program).split() == ["5", "1", "2", "1"]


@pytest.mark.slow
@needs_null_gpu
@pytest.mark.parametrize(
    ("changes", "times"), [((), 1), ((AUGMENTED, "hardware={micro_clips: 4, recompute: true, precision: bf16}"), 4)]
)
@pytest.mark.parametrize("model", NETWORKS)
def test_a_step_on_a_gpu_does_not_wait_and_launches_little(
    model: str, changes: tuple[str, ...], times: int, null_gpu: Callable[..., str]
) -> None:
    most = {"i3d_r50": 800, "i3d_nln_r50": 1200, "slowfast_r50": 1400, "r2plus1d_18": 1000, "swin3d_t": 2300}[model]
    words = ["k400_slowfast_8x8_r50_multigrid", "batch.clips=8", "hardware.precision=bf16", f"model={{name: {model}}}"]
    rows = [line.split() for line in null_gpu(ON_NULL_GPU, *words, *changes).splitlines()]
    groups = {int(row[1]) for row in rows}
    assert groups == {8, 4, 2, 1}
    for shape, _, waits, pageable, *_ in rows:
        assert (shape, waits, pageable) == (shape, "0", "0")
    assert max(int(row[4]) for row in rows[1::2]) <= times * most  # of steps whose tensors are all there
    if model == "slowfast_r50":  # group by group, in torch's copies to float32, it took 5.1 GiB
        assert max(float(row[5]) for row in rows) < 5.0


@pytest.mark.slow
@needs_null_gpu
def test_a_group_in_bf16_takes_the_room_of_its_result(null_gpu: Callable[..., str]) -> None:
    """Of five dimensions torch knows no channels last: it would copy to float32, and back."""
    program = """
import nullgpu, torch
from mgtrain.models import fused
from mgtrain.models.norm import GroupBatchNorm3d
from mgtrain.models.part import Part, set_part
nullgpu.set_up()
fused.usable = lambda x: False
norm = GroupBatchNorm3d(64).cuda()
x = torch.empty(8, 64, 16, 56, 56, dtype=torch.bfloat16, device="cuda").to(memory_format=torch.channels_last_3d)
set_part(norm, Part(0, 8, 8, 1))
before = torch.cuda.memory_allocated()
torch.cuda.reset_peak_memory_stats()
y = norm(x)
print((torch.cuda.max_memory_allocated() - before) / x.nbytes, y.stride() == x.stride())
"""
    room, same = null_gpu(program).split()
    assert float(room) < 1.1
    assert same == "True"


@pytest.mark.slow
@needs_null_gpu
def test_a_group_over_several_gpus_takes_torchs_kernels_and_does_not_wait(null_gpu: Callable[..., str]) -> None:
    program = """
import nullgpu, torch
from mgtrain.models.norm import GroupBatchNorm3d
from mgtrain.models.part import Part, set_part
nullgpu.set_up()
gathers = []

def gather(tensor, ranks):
    gathers.append((ranks, *tensor.shape))
    return tensor.expand(ranks, *tensor.shape).contiguous()

for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for layout in (torch.channels_last_3d, torch.contiguous_format):
        norm = GroupBatchNorm3d(64).cuda()
        set_part(norm, Part(4, 4, 32, 4, ranks=8, gather=gather))
        x = torch.empty(4, 64, 4, 14, 14, dtype=dtype, device="cuda").to(memory_format=layout).requires_grad_()
        above = torch.empty(4, 64, 4, 14, 14, dtype=dtype, device="cuda")  # in another layout than one of them
        norm(x, relu=True).backward(above)
        gathers.clear()
        with nullgpu.counted() as asked:
            y = norm(x, relu=True)
            (grad,) = torch.autograd.grad(y, x, above)
        print(y.dtype == grad.dtype == dtype, y.stride() == x.stride(), grad.shape == x.shape, asked.waits,
              asked.launches <= 30, gathers == [(2, 2, 64)] * 2)
"""
    rows = [line.split() for line in null_gpu(program).splitlines()]
    assert rows == [["True", "True", "True", "0", "True", "True"]] * 6


@pytest.mark.slow
@needs_null_gpu
def test_a_measured_step_does_not_wait_either(null_gpu: Callable[..., str]) -> None:
    program = """
import nullgpu, torch
from mgtrain.engine.checks import make_model
from mgtrain.engine.step import to_device
from mgtrain.models.fused.norm import works
from mgtrain.preflight.bench_step import SPANS, time_step
from mgtrain.processes.distributed import World
from mgtrain.recipe import load_recipe
from mgtrain.schedule import make_plan

nullgpu.set_up()
recipe, gpu = load_recipe("demo_multigrid", ["hardware.precision=bf16"]), World(device=torch.device("cuda", 0))
works(gpu.device)
model, step = to_device(make_model(recipe), recipe, gpu), make_plan(recipe, 1000)[0]
for repeats in (1, 5):
    with nullgpu.counted() as asked:
        row = time_step(model, recipe, step, gpu, repeats)
    print(asked.waits, asked.pageable, row.keys() >= SPANS.keys())
"""
    assert null_gpu(program).splitlines() == ["1 0 True"] * 2  # at the end, for the times
