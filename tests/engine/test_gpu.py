"""What only a GPU shows: the same numbers as a CPU's, in every precision, compiled or not. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mgtrain.clips.loader import _transfer
from mgtrain.engine.checks import make_model
from mgtrain.engine.fit import fit
from mgtrain.engine.machine.warmup import set_up, warm_up
from mgtrain.engine.step import to_device, train_step
from mgtrain.engine.update.optim import make_optimizer
from mgtrain.models.dropout import hashed_mask
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe, load_recipe
from mgtrain.runs.folder import RunDir
from mgtrain.schedule import make_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]
GPU, CPU = World(device=torch.device("cuda")), World()


@pytest.fixture(autouse=True)
def all_bits() -> None:
    """Products of float32 in all its bits, which are compared."""
    set_up(load_recipe("demo_baseline", ["hardware.tf32=false"]), GPU.device)


def losses(recipe: Recipe, world: World, steps: int = 6) -> list[float]:
    """Of the first steps, on clips that do not depend on the device."""
    torch.manual_seed(0)
    plan = make_plan(recipe, 24)
    model = to_device(make_model(recipe), recipe, world)
    optimizer = make_optimizer(model, recipe.optim)
    scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.hardware.precision == "fp16")
    mode = warm_up(model, recipe, plan, 0, world)
    found = []
    for step in list(plan)[:steps]:
        shape = step.shape
        rng = torch.Generator().manual_seed(step.index)
        clips = torch.randint(0, 256, (shape.clips, shape.frames, shape.crop, shape.crop, 3), generator=rng)
        labels = torch.randint(0, 4, (shape.clips,), generator=rng)
        there = _transfer(clips.to(torch.uint8), labels, world.device)
        with mode(step):
            result = train_step(
                model, optimizer, scaler, there[0].permute(0, 4, 1, 2, 3), there[1], step, recipe, world
            )
        found.append(result.loss)
    return [loss.item() for loss in found]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["true", "false"])
@pytest.mark.parametrize("model", ["i3d_r50", "i3d_nln_r50", "slowfast_r50"])
def test_a_gpu_computes_what_a_cpu_does(
    model: str, layout: str, precision: str, tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgtrain.models.dropout.keep_mask", hashed_mask)  # on a CPU the masks of a GPU
    changes = (f"model={{name: {model}, width: 16, depth: [1, 2, 2, 1]}}", f"hardware.channels_last={layout}")
    here = losses(tiny(*changes, f"hardware.precision={precision}"), GPU)
    assert here == pytest.approx(losses(tiny(*changes), CPU), rel={"fp32": 1e-3, "bf16": 0.1, "fp16": 0.03}[precision])


@pytest.mark.parametrize("how", ["hardware.compile=default", "hardware.compile=graphs", "hardware.recompute=true"])
def test_how_it_is_computed_changes_nothing(
    how: str, tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgtrain.engine.machine.warmup.pays", lambda *_: True)
    assert losses(tiny(how), GPU) == pytest.approx(losses(tiny(), GPU), rel=1e-3)


def test_a_run_trains_within_little_memory(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *_: None)  # below cuBLAS's own needs
    runs = [RunDir(tmp_path / name) for name in ("free", "little")]
    fit(tiny("batch.clips=16"), runs[0], GPU)
    fit(tiny("batch.clips=16", "hardware.memory_gib=0.02"), runs[1], GPU)
    rows = [[row["loss"] for row in run.rows("steps.jsonl")] for run in runs]
    assert rows[1] == pytest.approx(rows[0], rel=1e-2)


def test_a_batch_arrives_whole() -> None:
    clips = torch.randint(0, 256, (64, 8, 112, 112, 3), dtype=torch.uint8).pin_memory()
    for _ in range(3):
        there, labels = _transfer(clips, torch.arange(64).pin_memory(), GPU.device)
        torch.cuda._sleep(10_000_000)
        assert torch.equal(there.cpu(), clips)
        assert labels.tolist() == list(range(64))
