"""The command init, which writes recipes for own videos."""

import os
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from mgtrain.cli.options import Device, GroupBy, Json, Seed, check_finite, check_share
from mgtrain.console import note, progress, show, warn
from mgtrain.data.found import find_videos


def init(
    data: Annotated[Path, Option(help="A folder of videos, or a list of them.")],
    to: Annotated[Path, Option(help="Folder to write the recipes, the lists and classes.txt to.")] = Path(),
    name: Annotated[str | None, Option(help="Name of the recipes. Default: the folder's name.")] = None,
    val: Annotated[float, Option(help="Share of the videos for validation, unless the data is already split.")] = 0.2,
    group_by: GroupBy = None,
    hours: Annotated[
        float | None, Option(min=0.01, help="Time for training the baseline. Default: 1 on a CPU, 12 on GPUs.")
    ] = None,
    network: Annotated[
        Literal["swin3d_t", "mvit_v2_s"] | None,
        Option(help="Fine-tune this transformer from Kinetics weights. Default: train a network of fitting size."),
    ] = None,
    root: Annotated[Path | None, Option(help="The folder that a list's paths are relative to.")] = None,
    fps: Annotated[float | None, Option(min=0.01, help="Frame rate of videos that are folders of frames.")] = None,
    seed: Seed = 0,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Write recipes that fit your videos and this machine. Clips of one source stay together if names show it.

    Examples:  mgtrain init --data clips --to work  |  mgtrain init --data clips --group-by 'person\\d+' --hours 8
    """
    check_finite(hours=hours, fps=fps)
    check_share(val)
    videos = find_videos(data, root)

    from mgtrain.preflight.init import make_project

    name = name or os.path.basename(os.path.abspath(data)).partition(".")[0]
    with progress() as shown:
        made = make_project(
            data, videos, to, name, val=val, group_by=group_by, hours=hours, fps=fps, seed=seed, device=device,
            network=network, report=lambda text, warns: warn(text) if warns else note(text), progress=shown,
        )  # fmt: skip
    show(json_, made.describe(), made.render())
