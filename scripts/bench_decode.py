#!/usr/bin/env python
"""Measure how fast mgtrain and other readers read training clips from video files: clips per second per core.

    python scripts/bench_decode.py [--pyslowfast CHECKOUT] [--loader] [--json]

Two sets of the same videos are made once and kept: 340 x 256 pixels, 10 s at 30 frames/s, H.264 with B-frames, with a
key frame every 250 frames (the default of x264) and every 12. All contestants read the same clips (video, start and,
except for PySlowFast, region), each in a separate process with one thread on one core. They alternate within a round,
so that load on the machine affects all equally; ratios are computed per round. The files are cached. Decoding is
measured in CPU time, which other processes disturb less than wall-clock time; loaders (--loader) in wall-clock time.

Contestants, each written as a user of the library would write it for training:

    mgtrain      `VideoFile` and `cut_random`, as the loader calls them: uint8
    PySlowFast   `Kinetics.__getitem__` of a checkout in train mode, decoding with PyAV: normalised float32
    prepared     a prepared set of the same videos
    frames       the same videos as folders of JPEGs (quality 90), decoded by Pillow
    simplejpeg   the same folders, decoded by simplejpeg, if it is installed
    stretches    the same videos as stretches of one long recording
    torchcodec   `get_frames_at` with approximate seeking, then `resized_crop` of torchvision, which is faster: uint8
    decord       `get_batch`, then torchvision's `resized_crop`: uint8
    plain        PyAV decodes every frame from the key frame before the clip to its last frame, and nothing else
    floor        the same, but skips frames that neither the clip nor other frames need

torchcodec and decord are measured if they are installed (torchcodec needs FFmpeg's libraries). PySlowFast's modules are
loaded one by one from the checkout, with stubs for what Kinetics clips do not use: fvcore's CfgNode and Registry,
iopath, pandas, cv2, scipy. At its commit 287ec007, changes for the torchvision path broke the PyAV path, so
`decoder.py` is patched in memory:

    1. The sampling rate and number of frames come as lists of one number; `pyav_decode` unpacks them.
    2. `decode` expects a list of clips; `pyav_decode` returns a list of one clip.
    3. `decode` returns the clips' times, which the PyAV path never sets; they are zeros.
    4. The start of a clip is not random, but the one that all contestants use.

Two things favour PySlowFast. Its PyAV path decodes (frames - 1) * stride + 2 frames from the clip's start, up to a
tenth fewer than the others, and repeats the last. And it runs with one thread on one core: with PyAV's defaults and two
cores, it took a fifth more CPU time at 8 frames.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial
from importlib import metadata
from itertools import chain, islice, product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch.nn.functional import affine_grid, grid_sample
from torch.utils.data import DataLoader, Dataset

from mgtrain.clips.cut import Cut, VideoInfo, cut_random
from mgtrain.clips.order import ClipRequest, Order, step_requests
from mgtrain.grid import Grid
from mgtrain.rng import Draw, generator

WIDTH, HEIGHT, FPS = 340, 256, 30
KEY_FRAMES = (250, 12)  # frames from one key frame to the next, of each set of videos
WORKERS = 2  # processes of a loader

Read = Callable[[ClipRequest], Any]  # returns the clip in the form and type that the library's users would have
Contestant = Callable[[Sequence[str], "Job"], Read]
Rates = dict[str, list[float]]  # contestant -> clips/s per core in each round
ByJob = dict[str, Rates]
Measure = Callable[[Sequence[str], "Job"], float]


@dataclass(frozen=True, slots=True)
class Job:
    """The clips to read: `frames` frames `stride` apart, `crop` x `crop` pixels; loaders join `batch` of them."""

    frames: int
    stride: int
    crop: int
    batch: int

    @property
    def grid(self) -> Grid:
        """The grid of these clips, with the range of short sides that multigrid training uses at this crop."""
        return Grid(self.frames, self.crop, (self.stride, self.stride), (round(256 * self.crop / 224), 320))

    def __str__(self) -> str:
        return f"{self.frames}x{self.stride} {self.crop}²"


JOBS = (Job(8, 8, 112, batch=32), Job(8, 8, 158, batch=32), Job(16, 4, 224, batch=16), Job(32, 2, 224, batch=8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(tempfile.gettempdir()) / "mgtrain-bench-decode"
    parser.add_argument("--videos", type=Path, default=default, help="folder of the videos, created if missing")
    parser.add_argument("--pyslowfast", type=Path, metavar="CHECKOUT", help="folder that holds slowfast/")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="only these contestants")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--clips", type=int, default=40, help="clips per job and round")
    parser.add_argument("--loader", action="store_true", help=f"measure whole loaders of {WORKERS} workers")
    parser.add_argument("--cores", type=int, nargs="+", help="decode on the first, load on all; default: the first two")
    parser.add_argument("--smoke", action="store_true", help="one round of two clips of short videos")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    jobs = [replace(job, batch=2) for job in JOBS] if options.smoke else [*JOBS]
    if options.smoke:
        options.videos, options.repeats, options.clips = options.videos / "smoke", 1, 2
    cores = options.cores or sorted(os.sched_getaffinity(0))[:WORKERS]
    contestants = CONTESTANTS | ({"PySlowFast": partial(pyslowfast, options.pyslowfast)} if options.pyslowfast else {})
    if unknown := set(options.contestants or ()) - set(contestants):
        parser.error(f"no contestant {min(unknown)!r}; choose among {', '.join(contestants)}")
    contestants = {name: contestants[name] for name in options.contestants or contestants}
    os.environ["OMP_NUM_THREADS"] = "1"  # for the contestants' processes

    sets = make_videos(options.videos, videos=2 if options.smoke else 12, frames=80 if options.smoke else 300)
    race = partial(compare, sets=sets, jobs=jobs, repeats=options.repeats)
    if options.loader:
        measures = {
            name: partial(loader_rate, options.clips, len(cores), contestant)
            for name, contestant in contestants.items()
            if name not in ("plain", "floor", "prepared")  # the first two return no clips
        }
        alone = {"loader": partial(one_worker_rate, options.clips), "loop": partial(loop_rate, options.clips)}
        measured = {
            f"loaders of {WORKERS} workers on {len(cores)} core(s)": race(measures, cores=cores),
            "mgtrain on 1 core, loader of 1 worker and loop over the same clips": race(alone, cores=cores[:1]),
        }
    else:
        measures = {name: partial(decode_rate, options.clips, entrant) for name, entrant in contestants.items()}
        measured = {"decoding": race(measures, cores=cores[:1])}

    if options.json:
        facts = {"schema": "mgtrain.bench_decode/1", "machine": machine(), "cores": cores, "clips": options.clips}
        print(json.dumps({**facts, "clips_per_second_per_core": measured}))
        return
    print(*(f"{key} {value}" for key, value in machine().items()), sep=", ")
    for kind, by_set in measured.items():
        for videos, by_job in by_set.items():
            report(f"{kind}; {videos}", by_job)


def compare(
    measures: Mapping[str, Measure],
    *,
    sets: Mapping[str, Sequence[str]],
    jobs: Sequence[Job],
    repeats: int,
    cores: Sequence[int],
) -> dict[str, ByJob]:
    """Measure all contestants on all jobs and sets of videos: they alternate, each in a separate process.

    A contestant that fails at the first job is left out, with a message that says why.
    """
    rates: dict[str, ByJob] = {videos: {str(job): {} for job in jobs} for videos in sets}
    turns = [*product(range(repeats), sets, jobs)]
    with ExitStack() as stack:
        processes = {name: stack.enter_context(process(cores)) for name in measures}
        for turn in turns:
            round_, videos, job = turn
            print(f"round {round_ + 1} of {repeats}: {videos}, {job}", file=sys.stderr, flush=True)
            for name in list(processes):
                try:
                    rate = processes[name].submit(measures[name], sets[videos], job).result()
                except (ImportError, OSError, RuntimeError) as error:
                    if turn != turns[0]:
                        raise
                    print(f"{name} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
                    del processes[name]
                else:
                    rates[videos][str(job)].setdefault(name, []).append(rate)
    return rates


def process(cores: Sequence[int]) -> ProcessPoolExecutor:
    """Start one process on these cores."""
    spawn = multiprocessing.get_context("spawn")  # several copies of FFmpeg conflict in one process
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=settle, initargs=(cores,))


def settle(cores: Sequence[int]) -> None:
    os.sched_setaffinity(0, cores)
    multiprocessing.set_start_method("fork", force=True)  # for a loader's workers, as by default
    warnings.filterwarnings("ignore", "This DataLoader will create")  # the cores may be fewer than the workers


def machine() -> dict[str, str]:
    """The CPU, its cores and the versions of the packages, on which the figures depend."""
    packages = ("av", "torch", "pillow", "simplejpeg", "torchcodec", "decord")
    installed = {name: metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "CPU": models[0].split(": ")[1] if models else platform.machine(),
        "cores": str(os.cpu_count()),
        **installed,
    }


def report(title: str, by_job: ByJob) -> None:
    """Print a table of rates, and tables of their ratios to the rates of PySlowFast, plain and loop."""
    names = list(dict.fromkeys(chain.from_iterable(by_job.values())))

    def table(head: str, cell: Callable[[Rates, str], str]) -> None:
        print(f"{head:16}" + "".join(f"{job:>20}" for job in by_job))
        for name in names:
            print(f"  {name:14}" + "".join(f"{cell(rates, name):>20}" for rates in by_job.values()))

    def ratio(rates: Rates, name: str, rival: str) -> str:
        return f"{statistics.median(a / b for a, b in zip(rates[name], rates[rival], strict=True)):.2f}"

    print(f"\n{title}: clips/s per core, median (range)")
    table("", lambda r, name: f"{statistics.median(r[name]):.1f} ({min(r[name]):.1f}-{max(r[name]):.1f})")
    for rival in ("PySlowFast", "plain", "loop"):
        if rival in names:
            table(f"vs {rival}", partial(ratio, rival=rival))


def decode_rate(clips: int, contestant: Contestant, paths: Sequence[str], job: Job) -> float:
    """Clips per second of CPU time, for the first `clips` clips of the job."""
    read, requests = contestant(paths, job), [request(position, len(paths), job) for position in range(clips)]
    read(requests[0])  # costs that occur only once do not count
    start = time.process_time()
    for wanted in requests:
        read(wanted)
    return clips / (time.process_time() - start)


def request(position: int, videos: int, job: Job) -> ClipRequest:
    """The request for the clip at a position of a run with seed 0."""
    return ClipRequest(Order(0, videos).at(position), position, job.grid)


def cut(wanted: ClipRequest, info: VideoInfo) -> Cut:
    """The frames and the region of a clip, as mgtrain's loader draws them."""
    return cut_random(wanted.grid, info, generator(0, Draw.CUT, wanted.position))


# ---- contestants ----------------------------------------------------------------------------------------------------


def mgtrain(paths: Sequence[str], job: Job) -> Read:
    from mgtrain.clips.decode import VideoFile

    def read(wanted: ClipRequest) -> np.ndarray:
        with VideoFile(paths[wanted.video]) as file:
            return file.read([cut(wanted, file.info)])[0]  # (T, S, S, 3)

    return read


def prepared(paths: Sequence[str], job: Job) -> Read:
    """Read the clips from a prepared set, which the first call makes beside the videos."""
    from mgtrain.clips.prepared import PreparedSet, Settings
    from mgtrain.preflight.prepare import prepare

    root = Path(os.path.commonpath([Path(path).parent for path in paths]))
    names = [Path(path).relative_to(root).as_posix() for path in paths]
    folder = root.with_name(f"{root.name}-prepared")
    done = prepare(root, names, folder, Settings((256, 160), 25, None), 1)
    ready = PreparedSet(folder)
    rows = ready.find(names)
    print(f"{folder.name}: {sum(done.bytes) / done.originals:.2f}x the bytes of the originals", file=sys.stderr)

    def read(wanted: ClipRequest) -> np.ndarray:
        with ready.open(int(rows[wanted.video]), names[wanted.video]) as file:
            return file.read([cut(wanted, file.info)])[0]  # (T, S, S, 3)

    return read


def frames(paths: Sequence[str], job: Job, decoder: str = "pillow") -> Read:
    """Read the clips from folders of JPEGs, which the first call makes beside the videos."""
    from PIL import Image

    import mgtrain.clips.frames as module
    from mgtrain.clips.decode import VideoFile
    from mgtrain.clips.sources import open_source

    if decoder == "pillow":
        module.decode_jpeg = None
    elif module.decode_jpeg is None:
        raise ImportError("simplejpeg is not installed")
    folders = [Path(path).parents[1] / f"{Path(path).parent.name}-frames" / Path(path).stem for path in paths]
    for folder, path in zip(folders, paths, strict=True):
        if folder.exists():
            continue
        part = folder.with_name(f"{folder.name}.part")
        part.mkdir(parents=True, exist_ok=True)
        with VideoFile(path) as file:
            for picture, numbers in file.pictures(range(file.info.frames)):
                Image.fromarray(picture).save(part / f"img_{numbers[0] + 1:05}.jpg", quality=90)
        part.rename(folder)

    def read(wanted: ClipRequest) -> np.ndarray:
        with open_source(folders[wanted.video], 30) as file:
            return file.read([cut(wanted, file.info)])[0]  # (T, S, S, 3)

    return read


def stretches(paths: Sequence[str], job: Job) -> Read:
    """Read the clips from stretches of one long file, which the first call makes beside the videos."""
    import av

    from mgtrain.clips.decode import VideoFile
    from mgtrain.clips.sources import open_source

    long = Path(paths[0]).parents[1] / f"{Path(paths[0]).parent.name}-recording.mp4"
    lengths = []
    for path in paths:
        with VideoFile(path) as file:
            lengths.append(file.info.frames)
    first = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    if not long.exists():
        part = long.with_suffix(".part")
        with av.open(str(part), "w", format="mp4") as joined:
            for path, start in zip(paths, first, strict=False):
                with av.open(path) as container:
                    (source,) = container.streams.video
                    if not joined.streams:
                        stream = joined.add_stream_from_template(source)
                    ticks = round(start / 30 / source.time_base)
                    for packet in container.demux(source):
                        if packet.size:
                            packet.pts, packet.dts, packet.stream = packet.pts + ticks, packet.dts + ticks, stream
                            joined.mux(packet)
        part.rename(long)

    def read(wanted: ClipRequest) -> np.ndarray:
        with open_source(f"{long}#f={first[wanted.video]},{first[wanted.video + 1]}") as file:
            return file.read([cut(wanted, file.info)])[0]  # (T, S, S, 3)

    return read


def torchcodec(paths: Sequence[str], job: Job) -> Read:
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

    def read(wanted: ClipRequest) -> torch.Tensor:
        decoder = VideoDecoder(paths[wanted.video], seek_mode="approximate", num_ffmpeg_threads=1)
        about = decoder.metadata
        clip = cut(wanted, VideoInfo(about.num_frames, about.average_fps, about.width, about.height))
        return resized_crop(decoder.get_frames_at(list(clip.frames)).data, clip)  # (T, 3, S, S)

    return read


def decord(paths: Sequence[str], job: Job) -> Read:
    from decord import VideoReader  # type: ignore[import-not-found]

    def read(wanted: ClipRequest) -> torch.Tensor:
        reader = VideoReader(paths[wanted.video], num_threads=1)
        clip = cut(wanted, VideoInfo(len(reader), reader.get_avg_fps(), WIDTH, HEIGHT))
        frames = torch.from_numpy(reader.get_batch(clip.frames).asnumpy())  # (T, H, W, 3)
        return resized_crop(frames.permute(0, 3, 1, 2), clip)  # (T, 3, S, S)

    return read


def resized_crop(frames: torch.Tensor, clip: Cut) -> torch.Tensor:
    """Crop and resize with torchvision, as its users do: uint8 (T, 3, H, W) -> uint8 (T, 3, S, S)."""
    from torchvision.transforms.v2 import functional

    left, top, width, height = clip.region
    frames = functional.resized_crop(frames, top, left, height, width, [clip.crop, clip.crop], antialias=True)
    return functional.horizontal_flip(frames) if clip.flip else frames


def plain(paths: Sequence[str], job: Job, skip: bool = False) -> Read:
    import av

    def read(wanted: ClipRequest) -> None:
        with av.open(paths[wanted.video]) as container:
            stream = container.streams.video[0]
            codec, fps = stream.codec_context, stream.average_rate
            codec.thread_count = 1
            clip = cut(wanted, VideoInfo(stream.frames, float(fps), stream.width, stream.height))
            sampled = {round(stream.start_time + k / fps / stream.time_base) for k in clip.frames}  # timestamps
            missing = set(sampled)
            for packet in packets_from(container, stream, min(sampled)):
                if skip:
                    codec.skip_frame = "DEFAULT" if packet.pts in sampled else "NONREF"
                missing.difference_update(frame.pts for frame in packet.decode())
                if not missing:
                    return
        raise AssertionError(f"{paths[wanted.video]}: the decoder returns no frames at {sorted(missing)}")

    return read


def packets_from(container: Any, stream: Any, pts: int) -> Iterator[Any]:
    """The packets from the last key frame that is shown at or before `pts`."""
    target = pts
    while True:
        container.seek(target, stream=stream)
        packets = container.demux(stream)
        first = next(packets)
        if first.pts <= pts:
            return chain([first], packets)
        target = first.dts - 1  # seeking uses decoding times; this key frame is shown after `pts`


def pyslowfast(checkout: Path, paths: Sequence[str], job: Job) -> Read:
    from mgtrain.clips.decode import VideoFile

    slowfast = load_pyslowfast(checkout)
    config = slowfast.config
    config.DATA.DECODING_BACKEND, config.DATA.PATH_LABEL_SEPARATOR = "pyav", "|"
    config.DATA.NUM_FRAMES, config.DATA.SAMPLING_RATE, config.DATA.TRAIN_CROP_SIZE = job.frames, job.stride, job.crop
    config.MULTIGRID.DEFAULT_S = 224  # so the lower end of the short side, 256 pixels, shrinks with the crop
    config.MODEL.ARCH = "slow"  # no second copy of the frames for a slow pathway
    infos = []
    for path in paths:
        with VideoFile(path) as file:
            infos.append(file.info)
    with tempfile.TemporaryDirectory() as config.DATA.PATH_TO_DATA_DIR:
        rows = "".join(f"{path}|0\n" for path in paths)
        Path(config.DATA.PATH_TO_DATA_DIR, "train.csv").write_text(rows)
        videos = slowfast.kinetics.Kinetics(config, "train")

    def read(wanted: ClipRequest) -> torch.Tensor:
        start = cut(wanted, infos[wanted.video]).frames[0]
        slowfast.decoder.random = SimpleNamespace(uniform=lambda low, high: min(max(low, start), high))  # patch 4
        np.random.seed(wanted.position)  # for its random scale, crop and flip
        clip: torch.Tensor
        (clip,), _, index, _, _ = videos[wanted.video]
        # PySlowFast silently replaces a video that it cannot decode.
        assert index == wanted.video, f"PySlowFast cannot decode {paths[wanted.video]}"
        return clip  # (3, T, S, S)

    return read


@cache
def load_pyslowfast(checkout: Path) -> SimpleNamespace:
    """PySlowFast's `kinetics` and `decoder` modules and its default configuration."""
    import torchvision  # noqa: F401  # before the stand-ins, which it would use

    class CfgNode(SimpleNamespace):
        pass

    def unchanged(kind: Any) -> Any:
        return kind

    def stand_in(name: str, **contents: Any) -> None:
        sys.modules[name] = module = ModuleType(name)
        vars(module).update(contents)

    # 1. Packages without their `__init__`, which would import every data set.
    for package in ("slowfast", "slowfast.datasets", "slowfast.utils", "slowfast.config"):
        stand_in(package, __path__=[str(checkout / package.replace(".", "/"))])
    # 2. Modules that are absent.
    stand_in("fvcore")
    stand_in("fvcore.common")
    stand_in("fvcore.common.config", CfgNode=CfgNode)
    stand_in("slowfast.datasets.build", DATASET_REGISTRY=SimpleNamespace(register=lambda: unchanged))
    stand_in("slowfast.utils.logging", get_logger=logging.getLogger)
    stand_in("slowfast.utils.env", pathmgr=SimpleNamespace(open=open, exists=os.path.exists))
    for name in ("cv2", "pandas", "scipy", "scipy.ndimage"):
        if name.split(".")[0] in sys.modules or not importlib.util.find_spec(name.split(".")[0]):
            sys.modules[name] = MagicMock()
    # 3. The decoder, patched.
    path = checkout / "slowfast/datasets/decoder.py"
    source = path.read_text()
    for old, new in (
        ("sampling_rate * (num_frames - 1)", "sampling_rate[0] * (num_frames[0] - 1)"),
        ("return frames, fps, decode_all_video\n", "return [frames], fps, decode_all_video\n"),
        ("num_frames_orig = num_frames\n", "num_frames_orig = num_frames; start_end_delta_time = np.zeros((1, 3))\n"),
    ):
        assert source.count(old) == 1, f"{path}: {old.strip()!r} does not occur exactly once; use commit 287ec007"
        source = source.replace(old, new)
    stand_in("slowfast.datasets.decoder", __package__="slowfast.datasets")
    decoder = sys.modules["slowfast.datasets.decoder"]
    exec(compile(source, path, "exec"), vars(decoder))
    # 4. The rest as it is.
    kinetics = importlib.import_module("slowfast.datasets.kinetics")
    config = importlib.import_module("slowfast.config.defaults")._C
    return SimpleNamespace(kinetics=kinetics, decoder=decoder, config=config)


# `main` adds PySlowFast if there is a checkout.
CONTESTANTS: dict[str, Contestant] = {
    "mgtrain": mgtrain,
    "prepared": prepared,
    "frames": frames,
    "simplejpeg": partial(frames, decoder="simplejpeg"),
    "stretches": stretches,
    "torchcodec": torchcodec,
    "decord": decord,
    "plain": plain,
    "floor": partial(plain, skip=True),
}


# ---- loaders --------------------------------------------------------------------------------------------------------


class Clips(Dataset[torch.Tensor]):
    """The clips of a contestant, by position."""

    def __init__(self, read: Read, videos: int, job: Job) -> None:
        self.read, self.videos, self.job = read, videos, job

    def __getitem__(self, position: int) -> torch.Tensor:
        return torch.as_tensor(self.read(request(position, self.videos, self.job)))


def loader_rate(clips: int, cores: int, contestant: Contestant, paths: Sequence[str], job: Job) -> float:
    """Clips per second per core from a loader with two workers."""
    if contestant is mgtrain:
        loader, _, _ = mgtrain_loader(paths, job, WORKERS)
    else:
        dataset = Clips(contestant(paths, job), len(paths), job)
        loader = DataLoader(dataset, job.batch, sampler=range(10**6), num_workers=WORKERS)
    return steady_rate(loader, job, WORKERS, clips) / cores


def one_worker_rate(clips: int, paths: Sequence[str], job: Job) -> float:
    """Clips per second from mgtrain's loader with one worker."""
    loader, _, _ = mgtrain_loader(paths, job, workers=1)
    return steady_rate(loader, job, 1, clips)


def loop_rate(clips: int, paths: Sequence[str], job: Job) -> float:
    """Clips per second of a plain loop over the same clips, in this process."""
    _, dataset, plan = mgtrain_loader(paths, job, workers=1)
    order = Order(0, len(paths))
    batches = ([dataset[[wanted]] for wanted in step_requests(step, order)] for step in plan)
    return steady_rate(batches, job, 1, clips)


def mgtrain_loader(paths: Sequence[str], job: Job, workers: int) -> tuple[Iterable[Any], Any, Any]:
    """The batches of a run's loader, the loader's data set, and the plan."""
    from mgtrain.clips.loader import BadVideos, train_batches
    from mgtrain.clips.units import RandomClips
    from mgtrain.data.videos import Videos
    from mgtrain.processes.distributed import World
    from mgtrain.recipe import parse_recipe
    from mgtrain.schedule import make_plan

    low, high = job.grid.short_side
    recipe = parse_recipe(
        f"""
        data: {{format: list, root: ., train: train.csv, val: val.csv, classes: 2}}
        clip: {{frames: {job.frames}, stride: {job.stride}, crop: {job.crop}, short_side: [{low}, {high}]}}
        evaluation: {{crop: {job.crop}, short_side: {job.crop}}}
        model: {{name: i3d_r50}}
        batch: {{clips: {job.batch}, bn_clips: {job.batch}}}
        optim: {{lr: 0.1, stages: [1000000]}}
        schedule: {{name: baseline}}
        hardware: {{workers: {workers}}}
        """,
        "bench_decode",
    )
    videos = Videos.of("", [(path, 0) for path in paths], classes=("one", "other"))
    plan = make_plan(recipe, len(videos))
    batches = train_batches(videos, recipe, plan, World(), BadVideos(len(videos), max_fraction=0))
    return batches, RandomClips(videos, recipe), plan


def steady_rate(loader: Iterable[Any], job: Job, workers: int, clips: int) -> float:
    """Clips per second after each worker's first batch, over at least `clips` clips, equally many from each worker."""
    batches, timed = iter(loader), workers * -(-clips // (workers * job.batch))
    for _ in islice(batches, workers):
        pass
    start = time.perf_counter()
    for _ in islice(batches, timed):
        pass
    return timed * job.batch / (time.perf_counter() - start)


# ---- videos ---------------------------------------------------------------------------------------------------------


def make_videos(folder: Path, videos: int, frames: int) -> dict[str, list[str]]:
    """The paths of the videos of each set, which are made if missing; all sets show the same pictures."""
    sets = {
        f"key frame per {gap}": [folder / f"key_frame_per_{gap}" / f"{n:02}.mp4" for n in range(videos)]
        for gap in KEY_FRAMES
    }
    for n, paths in enumerate(zip(*sets.values(), strict=True)):
        if all(path.exists() for path in paths):
            continue
        print(f"making video {n + 1} of {videos} in {folder}", file=sys.stderr, flush=True)
        pictures = list(draw(np.random.default_rng(n), frames))
        for path, gap in zip(paths, KEY_FRAMES, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            encode(path, pictures, gap)
    return {name: [str(path) for path in paths] for name, paths in sets.items()}


def draw(rng: np.random.Generator, frames: int) -> Iterator[np.ndarray]:
    """Pictures uint8 (H, W, 3): moving textured blobs before a textured background; a hand-held camera; noise."""
    layers = [Layer.draw(rng, background=k == 0) for k in range(rng.integers(4, 7))]
    noise = rng.uniform(1, 2.5)  # of the sensor, in grey levels
    for t in range(frames):
        shake = rng.normal(0, 0.001, 2)
        picture, *blobs = (layer.at(t, shake) for layer in layers)  # (4, H, W)
        pixels = picture[:3]
        for blob in blobs:
            pixels = pixels.lerp(blob[:3], blob[3:])
        grain = rng.normal(0, noise, (HEIGHT, WIDTH, 1))
        yield (pixels.permute(1, 2, 0).numpy() + grain).clip(0, 255).round().astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Layer:
    """A picture that sways, turns, grows and wobbles. Lengths are in halves of the frame's width and height."""

    picture: torch.Tensor  # (1, 4, N, N) RGB and opacity
    place: np.ndarray  # (2,)
    reach: np.ndarray  # (2,) of the swaying
    period: np.ndarray  # (2,) frames
    phase: np.ndarray  # (2,)
    size: float
    growth: float  # of the logarithm of the size, per frame
    turn: float  # radians per frame
    background: bool

    @classmethod
    def draw(cls, rng: np.random.Generator, background: bool, side: int = 512) -> Layer:
        colours = texture(rng, side, slope=rng.uniform(1.1, 1.4)) * rng.uniform(25, 50)
        colours += rng.uniform(70, 180, (3, 1, 1))
        y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
        blob = 0.4 - np.hypot(x, y) + 0.15 * texture(rng, side, slope=2.5)[:1]  # (1, N, N), above 0 inside
        opacity = np.ones_like(blob) if background else (20 * blob).clip(0, 1)
        return cls(
            torch.from_numpy(np.concatenate([colours, opacity])[None].astype(np.float32)),
            place=np.zeros(2) if background else rng.uniform(-0.5, 0.5, 2),
            reach=rng.uniform(0.05, 0.2, 2) if background else rng.uniform(0.1, 0.6, 2),
            period=rng.uniform(50, 200, 2),
            phase=rng.uniform(0, 2 * np.pi, 2),
            size=2 if background else rng.uniform(0.5, 1.2),
            growth=rng.normal(0, 0.0005),
            turn=rng.normal(0, 0.002),
            background=background,
        )

    def at(self, t: int, shake: np.ndarray) -> torch.Tensor:
        """The layer in frame `t`: float (4, H, W)."""
        centre = self.place + self.reach * np.sin(2 * np.pi * t / self.period + self.phase) + shake
        angle, scale = self.turn * t, math.exp(-self.growth * t) / self.size
        aspect, c, s = HEIGHT / WIDTH, scale * math.cos(angle), scale * math.sin(angle)
        linear = np.array([[c, -s * aspect], [s, c * aspect]])
        affine = np.concatenate([linear, -linear @ centre[:, None]], axis=1)[None]  # (1, 2, 3), frame -> picture
        grid = affine_grid(torch.from_numpy(affine.astype(np.float32)), [1, 4, HEIGHT, WIDTH], align_corners=False)
        grid = grid + 0.01 * torch.sin(9 * grid.flip(-1) + 0.15 * t)  # filmed things are seldom rigid
        padding = "reflection" if self.background else "zeros"
        return grid_sample(self.picture, grid, padding_mode=padding, align_corners=False)[0]


def texture(rng: np.random.Generator, side: int, slope: float) -> np.ndarray:
    """Noise of mostly one hue, whose amplitude falls with frequency as in photographs: (3, N, N), deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf  # no mean
    spectrum = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
    spectrum[1:] = 0.85 * spectrum[:1] + 0.5 * spectrum[1:]
    noise = np.fft.irfft2(spectrum * frequency**-slope, (side, side))
    noise /= noise.std((1, 2), keepdims=True)
    return noise


def encode(path: Path, pictures: Sequence[np.ndarray], gap: int) -> None:
    """Write an mp4 as x264 does by default, but with key frames every `gap` frames and nowhere else."""
    import av

    options = {"preset": "medium", "crf": "23", "g": f"{gap}", "keyint_min": f"{gap}", "sc_threshold": "0"}
    unfinished = path.with_suffix(".part")
    with av.open(str(unfinished), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={**options, "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = n, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    unfinished.rename(path)


if __name__ == "__main__":
    main()
