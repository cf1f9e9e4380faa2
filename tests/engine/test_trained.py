"""Asking a trained network: evaluations that are interrupted, videos without labels, weights from elsewhere."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import mgtrain.clips.sources
import mgtrain.engine.evaluate
from mgtrain.cli.trained import _caution
from mgtrain.clips.decode import VideoFile
from mgtrain.engine.evaluate import evaluate
from mgtrain.engine.fit import fit
from mgtrain.engine.trained import Answer, Trained, evaluation_videos, load_trained, predict_videos
from mgtrain.engine.trained.export import export
from mgtrain.errors import CheckpointError, DataError, NonFiniteError, ThresholdError, UsageError
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe, parse_recipe
from mgtrain.runs.checkpoint import _checksum
from mgtrain.runs.folder import RunDir
from mgtrain.runs.journal import Journal

ALONE = World()


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a finished run."""
    run = RunDir(tmp_path_factory.mktemp("run"))
    fit(tiny("optim.lr=0.05", "evaluation.times=1"), run, ALONE)
    return run.checkpoints()[-1]


@pytest.fixture
def trained(checkpoint: Path) -> Trained:
    return load_trained(checkpoint, None, (), ALONE)


def videos_of(trained: Trained) -> list[str]:
    videos = evaluation_videos(trained)
    return [videos.path(n) for n in range(len(videos))]


def sign(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a checkpoint with the right checksum, which anybody can compute."""
    checksum = _checksum(metadata["info"], tensors, tensors.__getitem__)
    save_file(tensors, path, {**metadata, "sha256": checksum})


def test_a_checkpoint_from_elsewhere_runs_no_module_that_is_not_trusted(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
    info = json.loads(metadata["info"])
    recipe = parse_recipe(info["recipe"], "a checkpoint", ["model={name: own, module: net, network: n}"])
    hostile = tmp_path / "hostile.safetensors"
    sign(load_file(checkpoint), hostile, {**metadata, "info": json.dumps({**info, "recipe": recipe.to_yaml()})})
    (tmp_path / "net.py").write_text("import pathlib\npathlib.Path('ran').touch()\nMODELS = {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for trust in ((), ("another",)):
        with pytest.raises(CheckpointError, match=r"module 'net' of its recipe; .*, add --trust net") as caught:
            load_trained(hostile, None, (), ALONE, trust)
        assert caught.value.exit_code == 4
    assert not Path("ran").exists()
    with pytest.raises(UsageError, match="has no network 'n'"):
        load_trained(hostile, None, (), ALONE, ("net",))
    assert Path("ran").exists()


def test_a_network_that_gives_nan_has_no_scores(checkpoint: Path, trained: Trained, tmp_path: Path) -> None:
    videos = evaluation_videos(trained)
    trained.model.head.linear.bias.data[1] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError, match=r"of 12 of 12 videos are not finite, such as those of .*mp4"):
        evaluate(trained.model, videos, trained.recipe, ALONE)
    with pytest.raises(NonFiniteError, match="of 1 of 1 videos"):
        predicted(trained, [videos.path(0)])
    with pytest.raises(NonFiniteError, match=r"\.mp4, 0\.0 s; use an earlier"):
        predicted(trained, [videos.path(0)], every=1)
    with pytest.raises(NonFiniteError, match=r"logits of clips .* are not finite"):
        export(trained, tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []
    bad = tmp_path / "bad.safetensors"
    with safe_open(checkpoint, "pt") as file:
        tensors, metadata = load_file(checkpoint), file.metadata()
    tensors["model.head.linear.bias"][1] = float("inf")
    sign(tensors, bad, metadata)
    with pytest.raises(CheckpointError, match=r"holds NaN or infinity, such as head\.linear\.bias"):
        load_trained(bad, None, (), ALONE)


def test_every_video_is_opened_once_for_all_its_views(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()

    class Counted(VideoFile):
        def __init__(self, path: Any, *words: Any) -> None:
            opened[str(path)] += 1
            super().__init__(path, *words)

    monkeypatch.setattr(mgtrain.clips.sources, "VideoFile", Counted)
    evaluate(trained.model, evaluation_videos(trained), trained.recipe, ALONE, (3, 3))
    assert opened == dict.fromkeys(videos_of(trained), 1)


def test_an_interrupted_evaluation_goes_on(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos, journal = evaluation_videos(trained), Journal(tmp_path / "s.csv", "this", 4)
    straight = evaluate(trained.model, videos, trained.recipe, ALONE, (2, 1))
    asked: list[int] = []
    predict = mgtrain.engine.evaluate.predict

    def until(most: int) -> Callable[..., Any]:
        def some(*words: Any) -> Any:
            for answer in predict(*words):
                if len(asked) == most:
                    raise KeyboardInterrupt
                asked.extend(answer[0].tolist())
                yield answer

        return some

    monkeypatch.setattr(mgtrain.engine.evaluate, "predict", until(6))
    with pytest.raises(KeyboardInterrupt):
        evaluate(trained.model, videos, trained.recipe, ALONE, (2, 1), journal)
    monkeypatch.setattr(mgtrain.engine.evaluate, "predict", until(100))
    resumed = evaluate(trained.model, videos, trained.recipe, ALONE, (2, 1), journal)
    assert asked == list(range(12))  # none twice
    assert np.array_equal(resumed.numbers, straight.numbers)
    assert np.array_equal(resumed.labels, straight.labels)
    assert np.array_equal(resumed.probabilities, straight.probabilities)


def predicted(
    trained: Trained, paths: list[str], views: tuple[int, int] = (1, 1), every: float | None = None
) -> tuple[list[Answer], dict[str, str]]:
    """The answers, and the causes of the videos without one."""
    found = [*predict_videos(trained, paths, ALONE, views, every)]
    answers = [answer for _, answer in found if not isinstance(answer, str)]
    return answers, {path: cause for path, cause in found if isinstance(cause, str)}


def test_answers_come_as_soon_as_they_are_known(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = videos_of(trained)[:2]
    answers = predict_videos(trained, [first, second], ALONE, (1, 1), every=1)
    assert next(answers)[0] == first
    monkeypatch.setattr("mgtrain.engine.trained.open_source", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # only the second is lost
        next(answers)


def test_predicting_is_evaluating_without_labels(trained: Trained) -> None:
    scored = evaluate(trained.model, evaluation_videos(trained), trained.recipe, ALONE, (2, 3))
    answers, failed = predicted(trained, videos_of(trained), (2, 3))
    assert not failed
    assert [answer.video for answer in answers] == videos_of(trained)
    assert np.array_equal(np.stack([answer.probabilities for answer in answers]), scored.probabilities)
    told = answers[0].describe(trained.classes, top=2)
    best = scored.probabilities[0].argmax()
    assert told["top"][0] == {
        "class": trained.classes[best], "number": best, "probability": float(scored.probabilities[0].max())
    }  # fmt: skip
    assert len(told["top"]) == 2


def test_a_long_video_is_looked_through(trained: Trained) -> None:
    path = videos_of(trained)[0]  # 24 frames, 30 a second; a clip spans 16 frames
    (answer,), _ = predicted(trained, [path], every=0.1)
    assert [(round(w.start * 30), round(w.end * 30)) for w in answer.windows] == [(0, 16), (3, 19), (6, 22), (8, 24)]
    assert np.allclose(answer.probabilities, np.mean([w.probabilities for w in answer.windows], axis=0))
    (middle,), _ = predicted(trained, [path])
    (by_fours,), _ = predicted(trained, [path], every=4 / 30)  # starts at 0, 4, 8; the middle is 4
    assert np.allclose(by_fours.windows[1].probabilities, middle.probabilities, atol=1e-6)
    assert "to     0.5 s: " in answer.render(trained.classes, top=2)


@pytest.mark.parametrize("every", [None, 1.0])
def test_videos_that_cannot_be_decoded_are_told_and_the_others_answered(
    trained: Trained, tmp_path: Path, every: float | None
) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    good = videos_of(trained)[0]
    answers, failed = predicted(trained, [str(tmp_path / "bad.mp4"), good], every=every)
    assert [answer.video for answer in answers] == [good]
    assert list(failed) == [str(tmp_path / "bad.mp4")]


@pytest.fixture
def weights(trained: Trained, tmp_path: Path) -> Callable[..., Path]:
    """Writes the network's weights without their recipe, with names of classes if given."""

    def write(*classes: str) -> Path:
        tensors = {f"model.{name}": tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
        path = tmp_path / "weights.safetensors"
        save_file(tensors, path, {"classes": json.dumps(classes)} if classes else {})
        return path

    return write


def test_weights_from_elsewhere_are_evaluated_as_they_are(
    trained: Trained, weights: Callable[..., Path], tiny_text: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(tiny_text)
    foreign = load_trained(weights(), str(recipe), (), ALONE)
    assert (foreign.step, foreign.recalibrated, foreign.named) == (None, True, False)
    ours = evaluate(trained.model, evaluation_videos(trained), trained.recipe, ALONE)
    theirs = evaluate(foreign.model, evaluation_videos(foreign), foreign.recipe, ALONE)
    assert np.array_equal(theirs.probabilities, ours.probabilities)
    assert load_trained(weights("left", "right", "up", "down"), str(recipe), (), ALONE).named
    with pytest.raises(UsageError, match="name the recipe that cuts clips"):
        load_trained(weights(), None, (), ALONE)
    with pytest.raises(ThresholdError, match="use the model that the weights belong to"):
        load_trained(weights(), str(recipe), ["model.width=16"], ALONE)
    with pytest.raises(CheckpointError, match=r"set data\.classes"):
        load_trained(weights(), str(recipe), ["data.classes=5"], ALONE)
    with pytest.raises(CheckpointError, match=r"has 3 classes, but data\.classes is 4"):
        load_trained(weights("left", "right", "up"), str(recipe), (), ALONE)


def test_a_damaged_checkpoint_is_not_used(checkpoint: Path, tmp_path: Path) -> None:
    content = bytearray(checkpoint.read_bytes())
    content[-5] ^= 1  # one bit of a tensor
    (tmp_path / "step_00000001.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged: its checksum does not match"):
        load_trained(tmp_path / "step_00000001.safetensors", None, (), ALONE)


def test_a_checkpoint_has_its_own_recipe(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="leave out --recipe"):
        load_trained(checkpoint, "demo_baseline", (), ALONE)


def test_the_training_videos_need_not_be_there(trained: Trained, checkpoint: Path, tmp_path: Path) -> None:
    alone = load_trained(checkpoint, None, ["data.train=gone.csv"], ALONE)
    ours = evaluate(alone.model, evaluation_videos(alone), alone.recipe, ALONE)
    assert ours.scores() == evaluate(trained.model, evaluation_videos(trained), trained.recipe, ALONE).scores()


def test_a_list_may_lack_the_last_of_a_networks_numbered_classes(
    trained: Trained, motions: Path, tmp_path: Path
) -> None:
    (tmp_path / "videos").symlink_to(motions / "videos")
    (tmp_path / "val.csv").write_text("videos/val/left_0.mp4 0\nvideos/val/right_0.mp4 1\n")
    recipe = trained.recipe.changed("data", root=str(tmp_path))
    numbered = dataclasses.replace(trained, classes=("0", "1", "2", "3"), recipe=recipe)
    assert evaluation_videos(numbered).classes == ("0", "1", "2", "3")
    with pytest.raises(DataError, match=r"val\.csv has 2 classes, but the network has 4"):
        evaluation_videos(dataclasses.replace(numbered, step=None))


def test_classes_in_another_order_than_the_networks_are_refused(
    trained: Trained, checkpoint: Path, motions: Path, tmp_path: Path
) -> None:
    (tmp_path / "videos").symlink_to(motions / "videos")
    (tmp_path / "val.csv").write_text((motions / "val.csv").read_text())
    (tmp_path / "classes.txt").write_text("".join(f"{name}\n" for name in reversed(trained.classes)))
    other = load_trained(checkpoint, None, [f"data.root={tmp_path}"], ALONE)
    with pytest.raises(DataError, match="class 0 is 'down' in classes"):
        evaluation_videos(other)


def test_the_identity_changes_with_what_changes_the_answer(checkpoint: Path, trained: Trained) -> None:
    def identity(*overrides: str) -> str:
        return load_trained(checkpoint, None, overrides, ALONE).identity

    assert identity() == identity("hardware.workers=2", "logging.steps=3") == trained.identity
    assert identity("evaluation.short_side=40") != trained.identity
    assert identity("hardware.precision=bf16") != trained.identity


def test_a_pass_has_no_more_clips_than_one_of_training(trained: Trained) -> None:
    sizes = []
    handle = trained.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    whole = evaluate(trained.model, evaluation_videos(trained), trained.recipe, ALONE, (3, 3))
    handle.remove()
    assert sizes == [4, 4, 1] * 12
    assert torch.is_grad_enabled()
    assert len(whole.numbers) == 12


def test_a_checkpoint_between_evaluations_is_used_with_a_warning(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = load_trained(checkpoint, None, (), ALONE)
    _caution(trained, checkpoint)
    assert capsys.readouterr().err == ""
    _caution(dataclasses.replace(trained, recalibrated=False), checkpoint)
    assert "BatchNorm statistics may be those of coarse shapes" in " ".join(capsys.readouterr().err.split())
