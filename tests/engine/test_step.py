"""One step: whole or in micro-batches it is the same step, at the plan's learning rate."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mgtrain.clips.loader import BadVideos, train_batches
from mgtrain.clips.order import Order
from mgtrain.clips.units import RandomClips
from mgtrain.data import open_videos
from mgtrain.engine.checks import check_micro_batches, make_model, micro_limit
from mgtrain.engine.start import first_model, open_data
from mgtrain.engine.step import StepResult, augmented, hits, loss_sum_of, parts, to_device, to_input, train_step
from mgtrain.engine.update.optim import make_optimizer
from mgtrain.errors import PlanError
from mgtrain.grid import Shape
from mgtrain.models.norm import GroupBatchNorm3d, group_slots, merge_group_stats
from mgtrain.processes.distributed import World
from mgtrain.recipe import Optim, Recipe
from mgtrain.schedule import Plan, Step, make_plan

AUGMENTED = (
    "augment.brightness=0.4", "augment.contrast=0.4", "augment.saturation=0.4", "augment.hue=0.1", "augment.erase=0.5",
    "augment.rand_augment=2", "augment.mixup=0.8", "augment.cutmix=1", "augment.label_smoothing=0.1",
)  # fmt: skip
EIGHT = ("batch.clips=8", "batch.bn_clips=4", "optim.stages=[12, 6]")  # 16, 8, 4 and 2 BatchNorm groups


class InDouble(nn.Module):
    """A model that computes in float64, up to its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.double())
        return logits


@dataclass(frozen=True)
class Trained:
    """What some steps came to."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    results: list[StepResult]
    passes: list[int]


def train(recipe: Recipe, wanted: list[int], double: bool = False) -> Trained:
    """Train on the given steps of the recipe's plan, from its first weights."""
    videos = open_videos(recipe.data.format, recipe.data.root, recipe.data.train)
    plan, world = make_plan(recipe, len(videos)), World()
    torch.manual_seed(0)
    model = to_device(make_model(recipe), recipe, world)
    nonzero_branches(model)
    if double:
        model = InDouble(model)
    optimizer, scaler = make_optimizer(model, recipe.optim), torch.amp.GradScaler("cpu", enabled=False)
    results, passes = [], []
    for index in wanted:
        clips, labels = next(train_batches(videos, recipe, plan.steps(index), world, BadVideos(len(videos), 0)))
        results.append(train_step(model, optimizer, scaler, clips, labels, plan[index], recipe, world))
        passes.append(len(list(parts(plan[index], recipe, world))))
    return Trained(model, optimizer, results, passes)


def nonzero_branches(model: nn.Module) -> None:
    """Every residual branch starts at zero; give them weight, so that all the layers have a say from the first step."""
    for module in model.modules():
        if isinstance(module, GroupBatchNorm3d):
            nn.init.constant_(module.weight, 0.5)


def assert_the_same_steps(micro: Trained, whole: Trained) -> None:
    """In float64 within; the logits and the loss are float32, so sums over other parts differ by its rounding."""
    for ours, theirs in zip(micro.results, whole.results, strict=True):
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.correct, theirs.correct)
    merge_group_stats(whole.model)
    merge_group_stats(micro.model)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(micro.model.state_dict()[name], value, rtol=1e-7, atol=1e-8, msg=name)


def tiny_plan(recipe: Recipe) -> Plan:
    return make_plan(recipe, 24)


def first_steps_of_phases(plan: Plan) -> list[int]:
    return [phase.first_step for phase in plan.phases]


@pytest.mark.parametrize(
    "augment",
    [(), AUGMENTED, ("data.multi_label=true", "augment.mixup=0.8"), ("optim.name=adamw", "optim.clip_norm=0.1")],
    ids=["plain", "augmented", "several_labels", "adamw"],
)
def test_whole_and_micro_batches_are_the_same_steps(tiny: Callable[..., Recipe], augment: tuple[str, ...]) -> None:
    recipe = tiny(*EIGHT, *augment)
    plan = tiny_plan(recipe)
    assert [phase.bn_groups for phase in plan.phases] == [16, 8, 4, 2, 2, 2]
    wanted = first_steps_of_phases(plan)[:4]
    whole = train(recipe, wanted, double=True)
    micro = train(tiny(*EIGHT, *augment, "hardware.micro_clips=4"), wanted, double=True)
    assert recipe.model.dropout == 0.5
    assert whole.passes == [1, 1, 1, 1]
    assert micro.passes == [2, 2, 2, 2]
    assert_the_same_steps(micro, whole)


def test_clips_of_balanced_classes_are_the_same_in_micro_batches(
    tiny: Callable[..., Recipe], motions: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(motions, tmp_path / "uneven"))
    lines = (root / "train.csv").read_text().splitlines()
    (root / "train.csv").write_text("\n".join(lines[:15]))  # of 6, 6, 3 and 0 videos
    words = (*EIGHT, f"data.root={root}", "data.balance=full")
    whole = train(tiny(*words), [0, 3], double=True)
    micro = train(tiny(*words, "hardware.micro_clips=4"), [0, 3], double=True)
    assert micro.passes == [2 * passes for passes in whole.passes] == [2, 2]
    assert_the_same_steps(micro, whole)
    unbalanced = train(tiny(*words[:-1]), [0, 3], double=True)
    assert not any(torch.equal(a.loss, b.loss) for a, b in zip(unbalanced.results, whole.results, strict=True))


def test_single_precision_agrees_to_its_rounding(tiny: Callable[..., Recipe]) -> None:
    wanted = first_steps_of_phases(tiny_plan(tiny(*EIGHT)))[:2]
    whole, micro = train(tiny(*EIGHT), wanted), train(tiny(*EIGHT, "hardware.micro_clips=4"), wanted)
    for ours, theirs in zip(micro.results, whole.results, strict=True):
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=0)


def test_the_step_uses_its_own_learning_rate(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("optim.momentum=0", "optim.nesterov=false", "optim.weight_decay=0")
    plan = tiny_plan(recipe)
    before, after = train(recipe, []), train(recipe, [4])
    assert plan[4].lr == pytest.approx(0.002 * 4)  # the long cycle's 16 clips against 4
    assert {group["lr"] for group in after.optimizer.param_groups} == {plan[4].lr}
    for old, new in zip(before.model.parameters(), after.model.parameters(), strict=True):
        assert new.grad is not None
        torch.testing.assert_close(new, old - plan[4].lr * new.grad)
        assert new.grad.abs().max() > 0


UPDATES = (
    Optim(lr=0.1, stages=(1.0,), momentum=0.9),
    Optim(lr=0.1, stages=(1.0,), momentum=0, nesterov=False),
    Optim(lr=0.1, stages=(1.0,), name="adamw", betas=(0.8, 0.9), weight_decay=0.1),
)


@pytest.mark.parametrize("optim", UPDATES, ids=["momentum", "plain", "adamw"])
@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format], ids=["last", "first"])
def test_the_update_is_torchs_whatever_the_layout(optim: Optim, layout: torch.memory_format) -> None:
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv3d(4, 6, (1, 3, 3)), nn.BatchNorm3d(6), nn.Conv3d(6, 4, (3, 1, 1)))
        model.to(memory_format=layout)
        model.fc = nn.Linear(4, 3)
        optimizer = make_optimizer(model, optim)
        if not fused:
            kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optim.name]
            optimizer = kind([{**group, "fused": False} for group in optimizer.param_groups])
        for seed in range(4):
            torch.manual_seed(seed)
            for n, p in enumerate(model.parameters()):  # some gradients lie as torch likes, not as their parameter does
                p.grad = torch.randn(p.shape) if n % 2 else torch.empty_like(p).copy_(torch.randn(p.shape))
            model[0].bias.grad = None
            if fused:
                optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(seed == 2)), None
            if fused or seed != 2:  # what is not finite changes nothing
                optimizer.step()
        found.append([p.detach() for p in model.parameters()])
        kept = [(p, value) for p, state in optimizer.state.items() for value in state.values() if value is not None]
        assert all(p.stride() == value.stride() for p, value in kept if value.ndim)
    torch.testing.assert_close(*found)


def test_batchnorm_is_not_decayed(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    model = make_model(recipe)
    decayed, undecayed, head = make_optimizer(model, recipe.optim).param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"], head["weight_decay"]) == (1e-4, 0, 1e-4)
    norms = [name for name, _ in model.named_parameters() if "norm" in name or "shortcut.1" in name]
    assert len(undecayed["params"]) == len(norms)
    assert len(head["params"]) == 2
    assert len(decayed["params"]) + len(norms) + 2 == len(list(model.parameters()))


def test_the_loss_is_the_mean_over_the_clips(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("model.dropout=0")
    trained = train(recipe, [0])
    # The classifier starts near zero: four classes, all as likely.
    assert trained.results[0].loss.item() == pytest.approx(torch.tensor(4.0).log().item(), abs=0.1)
    assert 0 <= trained.results[0].correct.item() <= 1
    assert trained.results[0].correct.item() * 64 == pytest.approx(round(trained.results[0].correct.item() * 64))


def test_the_loss_of_several_labels_is_binary_cross_entropy_averaged_over_classes(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("data.multi_label=true")
    logits, targets = torch.randn(5, 4), (torch.rand(5, 4) < 0.5).float()
    targets[0] = 0
    p = logits.double().sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean(1).sum()
    torch.testing.assert_close(loss_sum_of(logits, targets, recipe).double(), expected)
    first = logits.argmax(1)
    assert hits(logits, targets).tolist() == [bool(row[n]) for row, n in zip(targets, first, strict=True)]
    assert train(recipe, [0]).results[0].loss.item() == pytest.approx(math.log(2), abs=0.1)


def test_without_augmentation_the_input_is_the_clips_and_targets_are_labels(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    step, labels = step_of(recipe, 0), torch.arange(64) % 4
    clips = torch.randint(0, 256, (64, 3, 2, 16, 16), dtype=torch.uint8)
    (part,) = parts(step, recipe, World())
    x, targets = augmented(clips, labels, part, step, recipe)
    assert torch.equal(x, to_input(clips, recipe))
    assert targets is labels


@pytest.mark.parametrize("last", [True, False])
def test_augmented_clips_keep_the_recipes_memory_format(tiny: Callable[..., Recipe], last: bool) -> None:
    recipe = tiny(*AUGMENTED, f"hardware.channels_last={last}".lower())
    step = step_of(recipe, 0)
    clips = torch.randint(0, 256, (64, 2, 16, 16, 3), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    x, _ = augmented(clips, torch.arange(64) % 4, next(parts(step, recipe, World())), step, recipe)
    assert x.is_contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


@pytest.mark.parametrize("word", [*AUGMENTED[:5], *AUGMENTED[6:8]])
def test_each_augmentation_draws_anew_in_each_step_and_by_seed(tiny: Callable[..., Recipe], word: str) -> None:
    recipe, other = tiny(word), tiny(word, "seed=4")
    clips = torch.randint(0, 256, (64, 3, 2, 16, 16), dtype=torch.uint8)
    step, next_step = step_of(recipe, 0), step_of(recipe, 0, turn=1)
    results = [
        augmented(clips, torch.arange(64) % 4, next(parts(s, r, World())), s, r)[0]
        for s, r in [(step, recipe), (step, recipe), (replace(next_step, shape=step.shape), recipe), (step, other)]
    ]
    assert torch.equal(results[0], results[1])
    assert not any(torch.equal(results[0], result) for result in [*results[2:], to_input(clips, recipe)])


def test_labels_are_smoothed_in_the_loss(tiny: Callable[..., Recipe]) -> None:
    plain, smoothed = (train(tiny(*word), [0, 1, 2]).results[-1] for word in [(), ("augment.label_smoothing=0.5",)])
    assert not torch.equal(plain.loss, smoothed.loss)


def test_bf16_is_fp32_to_its_rounding(tiny: Callable[..., Recipe]) -> None:
    # Pixels enough that no map is 1 x 1: torch 2.14's bfloat16 convolutions corrupt memory there on a CPU.
    larger = ("clip.crop=64", "clip.short_side=[64, 72]", "model.dropout=0")
    wanted = [len(tiny_plan(tiny(*larger))) - 1]
    (exact,) = train(tiny(*larger), wanted).results
    rounded = train(tiny(*larger, "hardware.precision=bf16"), wanted)
    assert rounded.results[0].loss.dtype == torch.float32
    assert rounded.results[0].loss.item() == pytest.approx(exact.loss.item(), rel=0.01)  # bfloat16 has 8 bits
    assert {parameter.dtype for parameter in rounded.model.parameters()} == {torch.float32}


def step_of(recipe: Recipe, phase: int, turn: int = 0) -> Step:
    plan = tiny_plan(recipe)
    return plan[plan.phases[phase].first_step + turn]


@pytest.mark.parametrize(
    ("micro", "phase", "ranks", "expected"),
    [
        # 128 clips of 1/16 of the base's volume in 16 groups of 8: 1 base clip is 16 of them, 2 groups
        (1, 0, 1, [16] * 8),
        (2, 0, 1, [32] * 4),
        (3, 0, 1, [48, 48, 32]),
        (8, 0, 1, [128]),
        (1, 0, 4, [16, 16]),
        # 32 clips of 1/4 of the volume in 2 groups of 16
        (4, 3, 1, [16, 16]),
        (6, 3, 1, [16, 16]),  # 24 clips would cut a group
        (8, 3, 1, [32]),
        (4, 3, 2, [16]),
        (2, 3, 4, [8]),  # a rank's share of a group that spans two ranks
        (None, 3, 1, [32]),
    ],
)
def test_micro_batches_are_whole_groups(
    tiny: Callable[..., Recipe], micro: int | None, phase: int, ranks: int, expected: list[int]
) -> None:
    recipe = tiny(*EIGHT, f"hardware.micro_clips={'null' if micro is None else micro}")
    step = step_of(recipe, phase)
    everyone = [list(parts(step, recipe, World(rank, ranks))) for rank in range(ranks)]
    assert [[part.clips for part in mine] for mine in everyone] == [expected] * ranks
    covered = [clip for mine in everyone for part in mine for clip in range(part.first, part.first + part.clips)]
    assert covered == list(range(step.shape.clips))
    assert len({part.seed for mine in everyone for part in mine}) == 1


def test_each_step_has_its_own_dropout_seed(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    assert len({part.seed for step in tiny_plan(recipe) for part in parts(step, recipe, World())}) == 17


def test_micro_clips_count_at_the_base_shapes_volume(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("hardware.micro_clips=2")
    limits = [micro_limit(recipe, Shape(1, *size)) for size in [(8, 32), (8, 16), (4, 32), (2, 16), (2, 23)]]
    assert limits == [2, 8, 4, 32, 15]
    assert micro_limit(tiny(), Shape(1, 8, 32)) is None


def test_a_micro_batch_smaller_than_a_group_is_refused(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(*EIGHT, "hardware.micro_clips=3")
    with pytest.raises(PlanError) as caught:
        check_micro_batches(recipe, tiny_plan(recipe), ranks=1)
    message = str(caught.value)
    assert message.startswith("hardware.micro_clips 3 allows ")
    assert message.endswith("in one BatchNorm group; raise it, or lower batch.bn_clips")
    check_micro_batches(recipe, tiny_plan(recipe), ranks=4)  # a rank has but half a group
    check_micro_batches(
        tiny(*EIGHT, "hardware.micro_clips=5"), tiny_plan(recipe), ranks=1
    )  # 4 and what rounding adds to 23²


def test_a_micro_batch_that_parts_pairs_to_be_mixed_is_refused(tiny: Callable[..., Recipe]) -> None:
    words = ("batch.clips=6", "batch.bn_clips=3", "hardware.micro_clips=4", "optim.stages=[12, 6]")
    check_micro_batches(tiny(*words), tiny_plan(tiny(*words)), ranks=1)
    recipe = tiny(*words, "augment.mixup=1")
    with pytest.raises(PlanError) as caught:
        check_micro_batches(recipe, tiny_plan(recipe), ranks=1)
    assert re.match(r"hardware.micro_clips 4 makes micro-batches of \d+ clips in phase \d, but ", str(caught.value))
    assert "use another hardware.micro_clips or an even batch.bn_clips" in str(caught.value)


def test_clipping_with_a_loss_scale_is_of_the_unscaled_gradient(tiny: Callable[..., Recipe]) -> None:
    from mgtrain.engine.step import train_step
    from mgtrain.engine.update.optim import make_optimizer

    recipe, found = tiny("optim.clip_norm=0.01"), []
    step = make_plan(recipe, 24)[16]
    shape = step.shape
    clips = torch.randint(0, 256, (shape.clips, 3, shape.frames, shape.crop, shape.crop), dtype=torch.uint8)
    for enabled in (False, True):
        torch.manual_seed(0)
        model = make_model(recipe)
        optimizer, scaler = make_optimizer(model, recipe.optim), torch.amp.GradScaler("cpu", enabled=enabled)
        train_step(model, optimizer, scaler, clips, torch.arange(shape.clips) % 4, step, recipe, World())
        found.append([optimizer.state[p]["momentum_buffer"] for p in model.parameters()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-7)
    assert any(buffer.any() for buffer in found[0])


def test_another_seed_has_other_weights_clips_and_masks(tiny: Callable[..., Recipe]) -> None:
    found = []
    for seed in (3, 4):
        recipe = tiny(f"seed={seed}")
        train, _ = open_data(recipe)
        step = make_plan(recipe, len(train))[0]
        same = [*Order(0, len(train)).requests([0], step.grid)]  # the same video, at the same position
        weights = first_model(recipe, World()).stem.conv.weight
        found.append(
            (weights, RandomClips(train, recipe)[same].clips, torch.tensor(next(parts(step, recipe, World())).seed))
        )
    assert not any(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_step_in_micro_batches_that_is_left_out_leaves_all_groups_as_they_were(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("batch.bn_clips=2", "hardware.micro_clips=3", "model.dropout=0")
    plan, model = make_plan(recipe, 24), make_model(recipe)
    step, optimizer, scaler = plan[0], make_optimizer(model, recipe.optim), torch.amp.GradScaler("cpu", enabled=False)
    assert len(list(parts(step, recipe, World()))) > 1
    shape = step.shape
    clips = torch.randint(0, 256, (shape.clips, 3, shape.frames, shape.crop, shape.crop), dtype=torch.uint8)
    labels, bias = torch.zeros(shape.clips, dtype=torch.int64), model.head.linear.bias
    train_step(model, optimizer, scaler, clips, labels, step, recipe, World())
    before = [t.clone() for t in group_slots(model)]
    bias.data[0] = float("inf")
    assert train_step(model, optimizer, scaler, clips.flip(0), labels, step, recipe, World()).bad == 1
    assert all(map(torch.equal, before, group_slots(model)))


def test_an_update_that_overflows_the_loss_scale_is_skipped_but_not_counted_as_bad(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    step = make_plan(recipe, 24)[16]
    shape = step.shape
    clips = torch.randint(0, 256, (shape.clips, 3, shape.frames, shape.crop, shape.crop), dtype=torch.uint8)
    for factor, skipped in ((1.0, 0), (float("inf"), 1)):
        model = make_model(recipe)
        optimizer, scaler = make_optimizer(model, recipe.optim), torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = model.head.linear.weight.detach().clone()  # type: ignore[union-attr]
        model.head.linear.weight.register_hook(lambda gradient, factor=factor: gradient * factor)  # type: ignore[union-attr]
        done = train_step(model, optimizer, scaler, clips, torch.arange(shape.clips) % 4, step, recipe, World())
        assert (done.bad, done.skipped) == (0, skipped)
        assert torch.equal(before, model.head.linear.weight) is bool(skipped)  # type: ignore[union-attr]
