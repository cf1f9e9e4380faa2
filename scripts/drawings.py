"""Draw the pictures in docs/assets: the rooms, the life of a clip, the life of a step, and the multigrid schedule.

    python scripts/drawings.py

The SVG files are readable on light and dark pages, and on a phone. A test compares them with the script's output and
checks that the modules they name exist.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from html import escape
from math import log2, log10
from pathlib import Path

from mgtrain.recipe import load_recipe
from mgtrain.schedule import make_plan

ASSETS = Path(__file__).parent.parent / "docs/assets"
WIDTH = 460  # of a drawing, in pixels: a phone shows its text at 11 pixels
STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.small { font-size: 11.5px; fill: #57606a }
.file { font: 11px ui-monospace, monospace; fill: #57606a }
.band { fill: #eef1fb; stroke: #b9c3ea }
.box { fill: #ffffff; stroke: #8c9ad6 }
.line { stroke: #57606a; stroke-width: 1.5; fill: none }
.tip { fill: #57606a }
.range { fill: #4c86c6; fill-opacity: 0.3 }
.level { stroke: #2f6fb5; stroke-width: 2 }
.rate { stroke: #b3591a; stroke-width: 2; fill: none }
.grid { stroke: #57606a; stroke-opacity: 0.25 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e9f2 }
  .small, .file { fill: #b1bac8 }
  .band { fill: #23283a; stroke: #4a5582 }
  .box { fill: #2f3650; stroke: #6f7fc4 }
  .line { stroke: #b1bac8 }
  .tip { fill: #b1bac8 }
  .level { stroke: #7fb2e8 }
  .rate { stroke: #f0a267 }
  .grid { stroke: #b1bac8 }
}"""
RECIPE, VIDEOS = "k400_slowfast_8x8_r50_multigrid", 240_000  # of the schedule


@dataclass(frozen=True)
class Band:
    """A named column of boxes, each of which says what happens and in which modules."""

    name: str
    boxes: list[tuple[str, str]]
    then: str = ""  # text beside the arrow to the next band


@dataclass
class Canvas:
    """SVG elements, drawn from top to bottom; `y` is where the next one starts."""

    y: float = 4
    elements: list[str] = field(default_factory=list)

    def rect(self, kind: str, x: float, y: float, width: float, height: float) -> None:
        self.elements.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>')

    def text(self, words: str, x: float, y: float, kind: str = "", anchor: str = "start") -> None:
        named = f' class="{kind}"' if kind else ""
        self.elements.append(f'<text{named} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>')

    def line(self, kind: str, x: float, y: float, to_x: float, to_y: float) -> None:
        self.elements.append(f'<path class="{kind}" d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}"/>')

    def arrow(self, length: float, words: str = "") -> None:
        """Draw an arrow downwards from `y`."""
        x, end = WIDTH / 2, self.y + length
        self.elements.append(f'<path class="line" d="M{x:g} {self.y:g}V{end - 5:g}"/>')
        self.elements.append(f'<path class="tip" d="M{x - 4:g} {end - 7:g}h8l-4 7z"/>')
        if words:
            self.text(words, x + 12, self.y + length / 2 + 4, "small")
        self.y = end

    def svg(self, title: str) -> str:
        """The content of the SVG file."""
        size = f'viewBox="0 0 {WIDTH} {self.y + 4:g}" width="{WIDTH}" height="{self.y + 4:g}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>{escape(title)}</title>\n'
        return f"{head}<style>\n{STYLE}\n</style>\n" + "\n".join(self.elements) + "\n</svg>\n"


CLIP = [
    Band(
        "training process",
        [
            ("Look up the step: its shape, and its grid for each clip", "schedule/plan.py"),
            ("Request a video, at a position in the run, on the grid", "clips/order.py"),
        ],
        "queue of units, two steps ahead",
    ),
    Band(
        "loader processes, hardware.workers per rank",
        [
            ("Open the video or its prepared file", "clips/units.py clips/prepared/"),
            ("Draw stride, start, short side and window", "clips/cut.py"),
            ("Decode only the frames of the clip", "clips/decode.py"),
            ("Convert and resample only the region kept", "clips/pictures.py"),
            ("Apply RandAugment", "clips/augment.py"),
        ],
        "uint8 pixels in shared memory",
    ),
    Band(
        "training process",
        [("Join the units in the plan's order, copy to the device", "clips/loader.py")],
        "uint8 (b, 3, T, S, S)",
    ),
    Band(
        "device",
        [
            ("Normalize, change colours, erase", "clips/augment.py"),
            ("Mix clips in pairs", "engine/mix.py"),
            ("Pass through the network", "models/"),
        ],
    ),
]
STEP = [
    Band(
        "plan",
        [("Look up shape, phase, learning rate, BatchNorm groups", "schedule/plan.py")],
    ),
    Band(
        "each rank, with its share of the clips",
        [("Wait for the batch", "clips/loader.py engine/record.py")],
    ),
    Band(
        "each micro-batch: one or more whole BatchNorm groups",
        [
            ("Tell the network which part of the batch it gets", "models/part.py"),
            ("Augment, forward, loss, backward", "engine/step.py"),
        ],
        "until the rank's share is done",
    ),
    Band(
        "all ranks together",
        [
            ("Average the gradients", "processes/distributed.py"),
            ("Skip the update if a value is not finite on any rank", "engine/finite.py"),
            ("Update the weights", "engine/update/optim.py"),
        ],
    ),
    Band(
        "after the step, when it is due",
        [
            ("Log a row", "engine/record.py runs/folder.py"),
            ("Save a checkpoint, complete or not at all", "engine/resume.py runs/checkpoint.py"),
            ("Recalibrate BatchNorm, evaluate on the one grid", "engine/recalibrate.py engine/evaluate.py"),
        ],
    ),
]
ROOMS = [
    [("cli", "the commands")],
    [("preflight", "checks, measures, estimates, prepares")],
    [("engine", "trains and evaluates")],
    [("clips", "loads pixels"), ("runs", "records and judges")],
    [("schedule", "plans the steps"), ("data", "finds videos"), ("models", "networks")],
    [("recipe", "what to train"), ("processes", "ranks and workers")],
    [("errors", ""), ("rng", ""), ("grid", ""), ("console", "")],
]  # from the top floor down


def life(title: str, bands: list[Band]) -> str:
    """Draw bands one below the other, joined by arrows."""
    canvas = Canvas()
    for number, band in enumerate(bands):
        canvas.rect("band", 2, canvas.y, WIDTH - 4, 18 + 58 * len(band.boxes))
        canvas.text(band.name, 14, canvas.y + 18, "small")
        canvas.y += 26
        for place, (what, files) in enumerate(band.boxes):
            if place:
                canvas.arrow(16)
            canvas.rect("box", 14, canvas.y, WIDTH - 28, 42)
            canvas.text(what, 26, canvas.y + 18)
            canvas.text(files.replace(" ", " · "), 26, canvas.y + 34, "file")
            canvas.y += 42
        canvas.y += 8
        if number + 1 < len(bands):
            canvas.arrow(30 if band.then else 20, band.then)
    return canvas.svg(title)


def house() -> str:
    """Draw the rooms on their floors."""
    canvas, left, gap = Canvas(), 34, 8
    for above, rooms in enumerate(ROOMS):
        width = (WIDTH - 4 - left - gap * (len(rooms) - 1)) / len(rooms)
        canvas.text(str(len(ROOMS) - above), 14, canvas.y + 27, "small", "middle")
        for place, (name, does) in enumerate(rooms):
            x = left + place * (width + gap)
            canvas.rect("box", x, canvas.y, width, 44)
            canvas.text(name, x + width / 2, canvas.y + (19 if does else 27), anchor="middle")
            canvas.text(does, x + width / 2, canvas.y + 35, "small", "middle")
        canvas.y += 44 + gap
    canvas.y -= gap
    return canvas.svg("The rooms of mgtrain on seven floors. A room imports from lower floors only.")


def schedule() -> str:
    """Draw the clips of a mini-batch and, below, the learning rate over the steps of a shipped recipe."""
    phases = make_plan(load_recipe(RECIPE), VIDEOS).describe()["phases"]
    steps = phases[-1]["first_step"] + phases[-1]["steps"]
    canvas, left, right = Canvas(), 46, WIDTH - 4

    def across(step: int) -> float:
        return left + (right - left) * step / steps

    clips = [shape["clips"] for phase in phases for shape in phase["shapes"]]
    above, unit = 28, 36  # pixels: the top of the first chart, and for a factor of 2
    canvas.text("clips of a mini-batch (frames and pixels of a clip below)", 4, 14, "small")
    for level in range(round(log2(min(clips))), round(log2(max(clips))) + 1):
        y = above + (log2(max(clips)) - level) * unit
        canvas.line("grid", left, y, right, y)
        canvas.text(str(2**level), left - 5, y + 4, "small", "end")
    for phase in phases:
        first, last = across(phase["first_step"]), across(phase["first_step"] + phase["steps"])
        tops = [above + log2(max(clips) / shape["clips"]) * unit for shape in phase["shapes"]]
        shape = phase["shapes"][-1]
        canvas.elements.append(
            f'<path class="range" d="M{first:.1f} {min(tops):.1f}H{last:.1f}V{max(tops):.1f}H{first:.1f}z"/>'
        )
        canvas.line("level", first, tops[-1], last, tops[-1])
        if last - first > unit - 2:
            for row, words in enumerate((f"{shape['frames']}", f"{shape['crop']}²")):
                canvas.text(words, (first + last) / 2, tops[-1] + 14 + 13 * row, "small", "middle")
    canvas.y = above + log2(max(clips) / min(clips)) * unit + 36
    rates = [phase["lr"] for phase in phases]
    canvas.text("learning rate of the long cycle", 4, canvas.y + 18, "small")
    canvas.y += 30
    for power in range(-4, 1):
        y = canvas.y - power * 24
        canvas.line("grid", left, y, right, y)
        canvas.text(f"{10.0**power:g}", left - 5, y + 4, "small", "end")
    track = "".join(
        f"{'L' if number else 'M'}{across(phase['first_step']):.1f} {canvas.y - log10(rate) * 24:.1f}"
        f"H{across(phase['first_step'] + phase['steps']):.1f}"
        for number, (phase, rate) in enumerate(zip(phases, rates, strict=True))
    )
    canvas.elements.append(f'<path class="rate" d="{track}"/>')
    canvas.y += 4 * 24 + 18
    for thousands in range(0, steps // 1000 - 40, 50):
        canvas.text(f"{thousands},000" if thousands else "0", across(1000 * thousands), canvas.y, "small", "middle")
    canvas.text("steps", right, canvas.y, "small", "end")
    return canvas.svg("Clips of a mini-batch and learning rate over the steps of the Kinetics-400 recipe")


def drawings() -> dict[str, str]:
    """Each file's name and content."""
    return {
        "schedule.svg": schedule(),
        "rooms.svg": house(),
        "clip.svg": life("The life of a clip, from a request to the network", CLIP),
        "step.svg": life("The life of a step", STEP),
    }


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, content in drawings().items():
        (ASSETS / name).write_text(content, encoding="utf-8")
