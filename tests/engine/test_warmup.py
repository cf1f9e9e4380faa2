"""Meeting every shape before the first step, and compiling those that pay."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mgtrain.engine.checks import make_model
from mgtrain.engine.fit import fit
from mgtrain.engine.machine import warmup
from mgtrain.engine.machine.warmup import pays, warm_up
from mgtrain.engine.step import train_step
from mgtrain.engine.update.optim import make_optimizer
from mgtrain.models.dropout import DropFeatures
from mgtrain.models.norm import GroupBatchNorm3d, group_stats, reset_group_stats, undisturbed
from mgtrain.models.part import Part, set_part
from mgtrain.processes.distributed import World
from mgtrain.processes.watchdog import Watchdog
from mgtrain.recipe import Recipe
from mgtrain.runs.folder import RunDir
from mgtrain.schedule import Step, make_plan


def _state(model: torch.nn.Module) -> dict[str, object]:
    return copy.deepcopy(
        {**dict(model.named_parameters()), **dict(model.named_buffers())}
        | {name: (m.groups, m.gathered) for name, m in model.named_modules() if isinstance(m, GroupBatchNorm3d)}
    )


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` compiles nothing."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)


def test_warming_up_changes_nothing(tiny: Callable[..., Recipe], uncompiled: None) -> None:
    recipe = tiny("hardware.compile=default")
    model, plan = make_model(recipe).train(), make_plan(recipe, 24)
    set_part(model, Part(0, 32, 32, 8))
    model(torch.randn(32, 3, 2, 16, 16))  # so that there are statistics of groups to disturb
    before = _state(model)
    warm_up(model, recipe, plan, 0, World())
    after = _state(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("eager", "compiled", "cost", "expected"),
    [
        (1000.0, 500.0, 10.0, set(range(9))),  # all pay
        (1000.0, 1500.0, 10.0, set()),  # the first one is slower, so that none is tried after it
        (0.001, 0.0005, 10.0, set()),  # too short a run to compile anything
    ],
)
def test_a_shape_is_compiled_where_its_steps_win_back_the_time(
    eager: float, compiled: float, cost: float, expected: set[int], tiny: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch, uncompiled: None,
) -> None:  # fmt: skip
    now, tried = [0.0], []

    def timed(model: torch.nn.Module, recipe: object, step: object, world: object) -> float:
        if not within:
            return eager
        tried.append(step)
        now[0] += cost + warmup.PASSES * compiled
        return compiled

    @contextmanager
    def inside(*_: object) -> Iterator[None]:
        within.append(True)
        yield
        within.clear()

    within: list[bool] = []
    monkeypatch.setattr(warmup, "compiled", inside)
    monkeypatch.setattr(warmup, "_timed", timed)
    monkeypatch.setattr(warmup.time, "perf_counter", lambda: now[0])
    recipe = tiny("hardware.compile=default")
    plan = make_plan(recipe, 24)
    mode = warm_up(make_model(recipe), recipe, plan, 0, World())
    steps = [step for step, _ in plan.kinds().values()]
    assert {n for n, step in enumerate(steps) if not isinstance(mode(step), nullcontext)} == expected
    assert len(tried) == (len(steps) if expected else 1 if eager > 1 else 0)


def test_a_shape_of_many_groups_must_win_back_more(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, uncompiled: None
) -> None:
    asked: list[tuple[int, float]] = []
    monkeypatch.setattr(warmup, "pays", lambda steps, seconds, gain, cost: asked.append((steps, cost)) or False)
    monkeypatch.setattr(warmup, "_timed", lambda *_: 1.0)
    recipe = tiny("hardware.compile=default")
    plan = make_plan(recipe, 24)
    monkeypatch.setattr(World, "from_main", lambda self, value: value)
    for ranks in (1, 2):
        asked.clear()
        warm_up(make_model(recipe), recipe, plan, 0, World(size=ranks))
        assert set(asked) == {
            (steps, warmup.FIRST_SECONDS * groups // ranks)
            for (_, groups), (_, steps) in plan.kinds().items()
            if groups >= ranks  # others span two ranks, and are not compiled
        }
        assert len({cost for _, cost in asked}) > 1


def test_pays() -> None:
    assert pays(1000, 0.5, 0.2, 99)
    assert not pays(1000, 0.5, 0.2, 101)
    assert not pays(10**9, 1.0, -0.1, 0.5)


def test_without_compiling_a_cpu_has_nothing_to_warm(tiny: Callable[..., Recipe]) -> None:
    model = make_model(tiny())
    model.register_forward_hook(lambda *_: pytest.fail("a pass was made"))
    mode = warm_up(model, tiny(), make_plan(tiny(), 24), 0, World())
    assert isinstance(mode(make_plan(tiny(), 24)[0]), nullcontext)


def always(monkeypatch: pytest.MonkeyPatch, backend: Callable[..., object]) -> None:
    """Compile every kind of step, and by `backend`, which takes no C++ compiler."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(warmup, "pays", lambda *_: True)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic, mode: plain(self, backend=backend))
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that are compiled, which then run as they are."""
    found: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        found.append(graph)
        return graph.forward

    always(monkeypatch, backend)
    return found


def black(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Black clips of a step, uint8 (B, 3, T, S, S), and their labels, int64 (B,)."""
    clips, frames, crop = step.shape.clips, step.shape.frames, step.shape.crop
    pixels = torch.zeros(clips, 3, frames, crop, crop, dtype=torch.uint8)
    return pixels.contiguous(memory_format=torch.channels_last_3d), torch.zeros(clips).long()


@pytest.mark.filterwarnings("ignore")  # torch._dynamo's own
def test_a_layer_is_compiled_once_for_a_number_of_groups_and_keeps_its_place(
    tiny: Callable[..., Recipe], graphs: list[torch.fx.GraphModule]
) -> None:
    places = []
    norm = GroupBatchNorm3d(3)
    model, x = torch.nn.Sequential(norm, DropFeatures(0.5)), torch.randn(8, 3, 2, 4, 4)
    recipe = tiny("hardware.compile=default")
    for step, groups in enumerate((4, 2, 4, 2)):
        model.train()
        with warmup.compiled(model, recipe):
            for _ in range(2):
                set_part(model, Part(0, 8, 8, groups, seed=step))
                model(x)
        places.append((norm.group_mean.data_ptr(), norm.group_var.data_ptr()))
        with undisturbed(model):  # an evaluation in between
            reset_group_stats(model)
            set_part(model, Part(0, 8, 8, 1))
            model(x)
    assert len(graphs) == 2
    assert places[:2] == places[2:]  # else a CUDA graph would be recorded again


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_kind_of_step_is_compiled_once_and_not_in_the_run(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, graphs: list[torch.fx.GraphModule]
) -> None:
    """The tiny recipe has steps of one shape with several numbers of BatchNorm groups."""
    monkeypatch.setattr(warmup, "PASSES", 1)
    monkeypatch.setattr(warmup, "_timed", faster_each_time(warmup._timed))
    recipe, world = tiny("hardware.compile=default"), World()
    plan = make_plan(recipe, 24)
    kinds = {(step.shape, step.bn_groups) for step in plan}
    assert len(kinds) > len({shape for shape, _ in kinds})
    model = make_model(recipe)
    optimizer, scaler = make_optimizer(model, recipe.optim), torch.amp.GradScaler("cpu", enabled=False)
    mode = warm_up(model, recipe, plan, 0, world)
    assert len(graphs) == len(kinds)  # nor is a pass cut in two
    for step in plan:
        with mode(step):
            train_step(model, optimizer, scaler, *black(step), step, recipe, world)
    assert len(graphs) == len(kinds)
    step = plan[0]  # what was not compiled before the run is not compiled in it
    set_part(model, Part(0, step.shape.clips, step.shape.clips, step.bn_groups))
    with mode(step):
        model(torch.zeros(step.shape.clips, 3, step.shape.frames, 20, 20))
    assert len(graphs) == len(kinds)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["slowfast_r50", "i3d_nln_r50", "swin3d_t"])
def test_a_network_is_one_graph(model: str, tiny: Callable[..., Recipe], graphs: list[torch.fx.GraphModule]) -> None:
    recipe = tiny(f"model={{name: {model}}}", "hardware.compile=default")
    network = make_model(recipe).train()
    set_part(network, Part(0, 2, 2, 1))
    with warmup.compiled(network, recipe):
        network(torch.zeros(2, 3, 8, 64, 64))
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore")
def test_compiled_code_is_cut_where_ranks_exchange_gradients(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, graphs: list[torch.fx.GraphModule]
) -> None:
    monkeypatch.setattr(warmup, "PASSES", 1)
    monkeypatch.setattr(warmup, "_timed", faster_each_time(warmup._timed))
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)  # of a small network
    recipe = tiny("hardware.compile=default")
    plan = make_plan(recipe, 24)
    step = plan[len(plan) - 1]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        replica = DistributedDataParallel(make_model(recipe), broadcast_buffers=False, bucket_cap_mb=0.1)
        mode = warm_up(replica, recipe, plan, step.index, World())
        assert len(graphs) > 2
        assert all(parameter.grad is None for parameter in replica.parameters())
        graphs.clear()
        optimizer, scaler = make_optimizer(replica.module, recipe.optim), torch.amp.GradScaler("cpu", enabled=False)
        with mode(step):
            train_step(replica, optimizer, scaler, *black(step), step, recipe, World())
        assert graphs == []
    finally:
        torch.distributed.destroy_process_group()


def faster_each_time(timed: Callable[..., float]) -> Callable[..., float]:
    times = iter(range(1000, 0, -1))

    def faster(*args: object) -> float:
        timed(*args)
        return float(next(times))

    return faster


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_compiled_runs_as_it_is(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def backend(graph: object, inputs: object) -> None:
        raise RuntimeError("no compiler\nhere")

    always(monkeypatch, backend)
    recipe = tiny("hardware.compile=default")
    plan = make_plan(recipe, 24)
    mode = warm_up(make_model(recipe), recipe, plan, 0, World())
    assert all(isinstance(mode(step), nullcontext) for step in plan)
    assert "running it uncompiled: BackendCompilerFailed" in caplog.text
    assert caplog.text.count("no compiler here") == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["i3d_nln_r50", pytest.param("slowfast_r50", marks=pytest.mark.slow)])
def test_recomputed_blocks_compile_and_count_their_clips_once(
    model: str, tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, "aot_eager")
    found = []
    for changes in ((), ("hardware.recompute=true", "hardware.compile=default")):
        recipe = tiny(f"model={{name: {model}, width: 8, depth: [1, 1, 1, 1]}}", *changes)
        torch.manual_seed(0)
        network = make_model(recipe).double().train()
        set_part(network, Part(0, 4, 4, 2))
        x = torch.randn(4, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with warmup.compiled(network, recipe) if changes else nullcontext():
            network(x).square().sum().backward()
        found.append((group_stats(network), {name: p.grad for name, p in network.named_parameters()}))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


def test_compiling_is_not_watched(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, uncompiled: None
) -> None:
    watchdog, idle = Watchdog(900.0), []
    monkeypatch.setattr(warmup, "_timed", lambda *_: idle.append(watchdog._last) or 1.0)
    recipe = tiny("hardware.compile=default")
    watchdog.beat()
    warm_up(make_model(recipe), recipe, make_plan(recipe, 24), 0, World(watchdog=watchdog))
    assert set(idle) == {float("inf")}  # since nobody knows how long it takes
    assert watchdog._last < float("inf")


def test_a_gpu_computes_as_the_recipe_says(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, cuda, matmul = torch.backends.cudnn, torch.backends.cuda, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: shares.append(share))
    try:
        warmup.set_up(tiny("hardware={tf32: false, deterministic: true}"), torch.device("cpu"))
        assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark) == before
        for tf32, deterministic in ((False, True), (True, False)):
            recipe = tiny(f"hardware={{tf32: {tf32}, deterministic: {deterministic}}}".lower())
            warmup.set_up(recipe, torch.device("cuda"))
            assert cudnn.allow_tf32 is matmul.allow_tf32 is tf32
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")  # torch.compile reads it
            assert cudnn.benchmark is not deterministic
            assert torch.are_deterministic_algorithms_enabled() is cudnn.deterministic is deterministic
            for enabled in (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled):
                assert enabled() is not deterministic
        for gib in (20, 100):
            warmup.set_up(tiny(f"hardware.memory_gib={gib}"), torch.device("cuda"))
        assert shares == [1, 1, 0.25, 1]
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch._dynamo's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on a CPU")
def test_a_compiled_run_is_the_same_run(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmup, "pays", lambda steps, *_: steps >= 3)  # some shapes, not all
    chosen = []
    compiled = warmup._compiled
    monkeypatch.setattr(
        warmup, "_compiled", lambda *args: chosen.append(args[2].keys() and compiled(*args)) or chosen[-1]
    )
    losses = []
    for compile in ("no", "default"):
        run = RunDir(tmp_path / compile)
        fit(tiny(f"hardware.compile={compile}"), run, World())
        losses.append([row["loss"] for row in run.rows("steps.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
