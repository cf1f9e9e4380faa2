"""Statistics of the videos of a data set, from a sample, and their consequences for a recipe."""

from collections import Counter
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

from mgtrain.clips.cut import VideoInfo
from mgtrain.clips.sources import open_source
from mgtrain.console import ShowProgress, duration, no_progress
from mgtrain.data.videos import EXAMPLES, Videos, printable
from mgtrain.errors import DataError, VideoError
from mgtrain.processes.isolated import Lost, isolated
from mgtrain.recipe import Clip
from mgtrain.rng import Draw, generator

COMMONEST = 4  # sizes and codecs to name
MOST_NAMED = 12  # bars to label
QUANTILES = {"min": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "max": 1.0}


@dataclass(frozen=True, slots=True)
class Probe:
    """One opened video."""

    info: VideoInfo
    codec: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Stats:
    """The videos of one split, and what a sample of them holds."""

    videos: Videos
    opened: list[Probe]
    broken: list[str]  # path and error of each video of the sample that cannot be opened
    clip: Clip

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Each quantity of the opened videos: float64 (videos,)."""
        frames, fps, width, height = np.array([astuple(probe.info) for probe in self.opened], float).T
        lengths = {"frames": frames, "seconds": frames / fps, "fps": fps}
        return lengths | {"width": width, "height": height, "short_side": np.minimum(width, height)}

    @property
    def span(self) -> float:
        """The span of a clip of the base shape, in seconds."""
        return self.clip.frames * self.clip.stride / self.clip.fps

    def describe(self) -> dict[str, Any]:
        counts = self.videos.videos_per_class
        by_count = np.argsort(counts, kind="stable")
        sizes = Counter(f"{probe.info.width}x{probe.info.height}" for probe in self.opened)
        columns, largest = self.columns, self.clip.short_side[1]
        return {
            "videos": len(self.videos),
            "missing": self.videos.missing,
            "sample": len(self.opened) + len(self.broken),
            "broken": {"count": len(self.broken), "examples": self.broken[:EXAMPLES]},
            "classes": len(counts),
            "videos_per_class": {
                "min": int(counts.min()),
                "median": float(np.median(counts)),
                "max": int(counts.max()),
                "rarest": self.videos.classes[by_count[0]],
                "commonest": self.videos.classes[by_count[-1]],
                "empty": int((counts == 0).sum()),
            },
            **{
                name: {label: round(float(np.quantile(column, q)), 3) for label, q in QUANTILES.items()}
                for name, column in columns.items()
            },
            "sizes": {"different": len(sizes), "commonest": dict(sizes.most_common(COMMONEST))},
            "codecs": dict(Counter(probe.codec for probe in self.opened).most_common(COMMONEST)),
            "hours": round(float(columns["seconds"].mean()) * len(self.videos) / 3600, 6),
            "bytes": round(float(np.mean([probe.bytes for probe in self.opened])) * len(self.videos)),
            "recipe": {
                "span_seconds": round(self.span, 3),
                "shorter_than_span": int((columns["seconds"] < self.span - 1e-6).sum()),
                "largest_short_side": largest,
                "enlarged": int((columns["short_side"] < largest).sum()),
            },
        }


def make_stats(
    videos: Videos,
    clip: Clip,
    *,
    sample: int = 500,
    seed: int = 0,
    workers: int = 1,
    fps: float | None = None,
    progress: ShowProgress = no_progress,
) -> Stats:
    """Open a random `sample` of the videos in `workers` processes; one that crashes its process counts as broken.

    `fps` is the rate of folders of frames. Raises `DataError` if none of them can be opened.
    """
    drawn = generator(seed, Draw.CHOICE, 2).permutation(len(videos))[:sample]
    paths = [videos.path(int(row)) for row in np.sort(drawn)]
    probes: dict[str, Probe | str] = {}
    for path, found in isolated(partial(probe_video, fps=fps), dict.fromkeys(paths), max(1, workers)):
        if isinstance(found, Lost):
            found = printable(f"{path}: crashes the decoder ({found.cause})")
        probes[path] = found
        progress("videos opened", len(probes), len(paths))
    in_order = [probes[path] for path in paths]
    opened = [probe for probe in in_order if isinstance(probe, Probe)]
    broken = [error for error in in_order if isinstance(error, str)]
    if not opened:
        raise DataError(f"{videos.root}: none of {len(paths)} videos can be opened; first error: {broken[0]}")
    return Stats(videos, opened, broken, clip)


def probe_video(path: str, fps: float | None) -> Probe | str:
    """Open one video; returns its facts, or the error."""
    try:
        with open_source(path, fps) as file:
            return Probe(file.info, file.codec, file.nbytes)
    except VideoError as error:
        return printable(str(error))


def render(stats: Stats) -> str:
    facts = stats.describe()
    opened = len(stats.opened)
    per_class, recipe = facts["videos_per_class"], facts["recipe"]

    def share(count: int) -> str:
        return f"{count:,} of {opened:,} ({100 * count / opened:.1f} %)"

    def named(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {100 * count / opened:.0f} %" for name, count in counts.items())

    sampled = f", of which {facts['sample']:,} were opened" if facts["sample"] < facts["videos"] else ""
    missing = f", {facts['missing']:,} more without a file" if facts["missing"] else ""
    about = "about " if sampled else ""
    empty = f", {per_class['empty']:,} without any" if per_class["empty"] else ""
    lines = [
        f"videos      {facts['videos']:,}{sampled}{missing}",
        f"classes     {facts['classes']:,}, with {per_class['min']:,} ({per_class['rarest']}) to {per_class['max']:,} "
        f"({per_class['commonest']}) videos, median {per_class['median']:,g}{empty}",
        f"total       {about}{duration(facts['hours'] * 3600)}, {about}{decimal(facts['bytes'])}",
        f"sizes       {facts['sizes']['different']:,} different; {named(facts['sizes']['commonest'])}",
        f"codecs      {named(facts['codecs'])}",
        "",
        f"{'':12}" + "".join(f"{label:>10}" for label in QUANTILES),
        *(
            f"{name.replace('_', ' '):12}" + "".join(f"{value:>10,.4g}" for value in facts[name].values())
            for name in stats.columns
        ),
        "",
        f"shorter than the base clip's span of {recipe['span_seconds']:g} s, so the last frame repeats: "
        f"{share(recipe['shorter_than_span'])}",
        f"short side below {recipe['largest_short_side']}, the recipe's largest, so clips may be enlarged: "
        f"{share(recipe['enlarged'])}",
    ]
    return "\n".join(lines)


def draw_picture(stats: Stats, path: Path) -> None:
    """Draw videos per class, seconds, frames per second and sizes. Raises `UsageError` if it cannot be written."""
    from matplotlib.figure import Figure

    from mgtrain.runs.report.figures import save_figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    sample = f"{len(stats.opened) + len(stats.broken):,} opened, {len(stats.broken):,} of them broken"
    figure.suptitle(f"{len(stats.videos):,} videos, {len(stats.videos.classes):,} classes; {sample}", fontsize=12)
    (balance, seconds, fps, sizes) = figure.subplots(2, 2).flat
    counts = stats.videos.videos_per_class
    order = np.argsort(-counts, kind="stable")
    balance.bar(np.arange(len(counts)), counts[order], width=0.8 if len(counts) <= MOST_NAMED else 1.0)
    balance.set(title="class balance", xlabel="classes, commonest first", ylabel="videos")
    if len(counts) <= MOST_NAMED:
        names = [stats.videos.classes[label] for label in order]
        balance.set_xticks(np.arange(len(counts)), names, rotation=30, ha="right", parse_math=False)
    clip, columns = stats.clip, stats.columns
    seconds.hist(columns["seconds"], bins=30)
    seconds.axvline(stats.span, color="tab:red", label=f"span of the base clip, {stats.span:.3g} s")
    seconds.set(title="duration", xlabel="seconds", ylabel="videos opened")
    seconds.margins(y=0.2)  # room for the legend
    seconds.legend(frameon=False, fontsize=8)
    rates = Counter(f"{rate:.4g}" for rate in columns["fps"])
    shown = dict(rates.most_common(MOST_NAMED - 1))
    shown |= {"others": rates.total() - sum(shown.values())} if len(rates) > len(shown) else {}
    fps.bar(list(shown), list(shown.values()))
    fps.margins(x=max(0.05, 0.5 - 0.1 * len(shown)))
    fps.set(title="frame rate", xlabel=f"frames per second; strides count at {clip.fps:g}", ylabel="videos opened")
    sizes.scatter(columns["width"], columns["height"], s=14, alpha=0.4, linewidths=0)
    sizes.set(title="size", xlabel="width, pixels", ylabel="height, pixels")
    sizes.set(xlim=(0, 1.05 * columns["width"].max()), ylim=(0, 1.05 * columns["height"].max()))
    low, high = clip.short_side
    for value, style in ((low, ":"), (high, "--")):
        sizes.plot([value, value, max(sizes.get_xlim()[1], value)], [max(sizes.get_ylim()[1], value), value, value],
                   style, color="tab:red", linewidth=1, label=f"short side {value}")  # fmt: skip
    sizes.legend(frameon=False, fontsize=8)
    save_figure(figure, path, dpi=120, format="png")
