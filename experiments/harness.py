"""What the experiments share: the same held-out scenes, prompts and seeds, the measures, options, results, sheets.

An experiment is a file with a function `measure(experiment)` that adds rows, one after the other:

    held_out = HeldOut(experiment, sd, "canny")                  scenes from 1000 on, which no model was trained on
    held_out.row("canny, scale 2", net, conditioning_scale=2.0)  a column of the sheet, a row of the table

What is measured is kept row by row, so that --resume goes on after the last one.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import minicn.threads  # noqa: F401  (before torch, see there)

# isort: split
import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from minicn import ControlNet, StableDiffusion, conditions, toy
from minicn.checkpoints import files
from minicn.commands import cli
from minicn.toy import judging, measures
from minicn.trainer import recording, resuming

ROOT = Path(__file__).parents[1]
RESULTS, SHEETS = ROOT / "experiments" / "results", ROOT / "docs" / "experiments"
FOLDER = Path("runs/experiments")  # under the one that a command is given in
FIRST = 1000  # the first held-out scene; benchmarks/toy.py measures on the same
GUIDANCE = 3.0
BATCH = 25  # pictures drawn at once, each batch by a seed of its own
WIDE = 8  # columns of the sheet beside each other
WIDEST = 8  # figures beside each other in a table
Figures = dict[str, float]
Also = Callable[[Sequence[Image.Image], Sequence[toy.Scene]], Figures]


def main(
    file: str,
    doc: str,
    measure: Callable[["Experiment"], None],
    argv: Sequence[str] | None = None,
    *,
    scenes: int,
    options: Callable[[Callable], None] = lambda add: None,
    quick: dict | None = None,
) -> int:
    """Run an experiment's command line.

    file, doc  of the experiment
    scenes     held-out scenes by default
    options    adds options of its own, as `options(parser.add_argument)`
    quick      what --quick makes of its own options
    """
    name = Path(file).stem
    parser = cli.parser(prog=f"python experiments/{name}.py", description=doc.split("\n")[0])
    add = parser.add_argument
    add("--scenes", type=cli.whole(2, 10**4), default=scenes, help=f"held-out scenes, from test scene {FIRST} on")
    add("--seed", type=cli.whole(0, 10**9), default=0, help="of the pictures' noise, and of what is trained")
    add("--quick", action="store_true", help="2 scenes and 10 steps, in seconds: shows that it runs, measures nothing")
    folder = f"{FOLDER}/{name}"
    add("--output", type=Path, help=f"folder for results, sheet and checkpoints (default: {folder}, with --quick -quick)")
    add("--resume", action="store_true", help="go on after the last row in --output")
    add("--record", action="store_true", help="put results and sheet where the repository keeps them, too")
    add("--threads", type=cli.whole(1, 1024), default=1, help="threads to compute with; one is about as fast as two")
    options(add)
    args = parser.parse_args(argv)
    if args.record and args.quick:
        parser.error("--record with --quick: two scenes measure nothing, so leave out one of the two")
    defaults = {action.dest: action.default for action in parser._actions}
    if args.quick:
        vars(args).update({"scenes": 2, **(quick or {})})
    args.output = args.output or Path(folder + "-quick" * args.quick)
    with cli.polite_errors(args):
        cli.check_folder(args.output)
        compute(args.threads)
        experiment = Experiment(name, args, defaults)
        try:
            measure(experiment)
            experiment.finish()
        finally:
            experiment.release()
    return 0


def compute(threads: int) -> None:
    """Compute with so many threads."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def cpu_seconds() -> float:
    """Return the processor's seconds of this process, and of those of its own that have ended."""
    return sum(os.times()[:4])


class Experiment:
    """An experiment under way: what it has measured, and where that is kept.

    args      its options
    defaults  theirs, by name: what differs stands in the command that the results name
    """

    REPORTS = ("results.json", "sheet.png", "pictures", "checkpoints")

    def __init__(self, name: str, args: Namespace, defaults: dict):
        self.name, self.args, self.folder = name, args, args.output
        self.num_steps = 10 if args.quick else 20
        own = {
            key: value
            for key, value in vars(args).items()
            if key not in ("output", "resume", "record", "threads", "processes")
        }
        self.settings = {key: str(value) for key, value in own.items()}
        given = [f" --{key.replace('_', '-')} {value}" for key, value in own.items() if value != defaults[key]]
        self.command = f"python experiments/{name}.py" + (" --quick" if args.quick else "".join(given))
        self.columns: list[tuple[str, list[Image.Image]]] = []
        self.rows: dict[str, Figures] = {}
        self.shown = 4  # of the pictures of a row, in the sheet
        self.below: Image.Image | None = None  # what stands under the columns of the sheet
        self.drawn: dict[tuple, list[Image.Image]] = {}  # the bounds' pictures, by their scenes
        self.bounded: list[list[Image.Image]] = []  # the true pictures whose bounds stand in the sheet
        self.commit, self.earlier, self.memory, self.found = commit(), 0.0, 0.0, False
        self.begin()
        self.clock = cpu_seconds()

    @property
    def file(self) -> Path:
        return self.folder / "results.json"

    def begin(self) -> None:
        """Take the folder; read what --resume goes on from. Raises ValueError if it holds something else, or is in use."""
        self.found = self.file.is_file()
        if self.found and not self.args.resume:
            raise ValueError(f"{self.folder} already holds results: --resume goes on, another --output starts anew")
        if not self.found:
            resuming.check_free(self.folder, (), self.REPORTS)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = resuming.lock(self.folder)
        if self.found:
            self.read()

    def release(self) -> None:
        self._lock.close()

    def read(self) -> None:
        """Take the rows of an earlier run. Raises ValueError if its settings were others, or no run wrote them."""
        kept = files.read_json(self.file, "the results of an experiment")
        try:
            before, self.earlier = dict(kept["settings"]), float(kept["cpu_seconds"])
            self.memory = float(kept["memory_gb"])
            self.rows = {str(n): {str(k): float(v) for k, v in row.items()} for n, row in kept["rows"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{self.file} is damaged: remove {self.folder}, or name another --output") from error
        for key in {**before, **self.settings}:
            then, now = before.get(key), self.settings.get(key)
            if then != now:
                option = key.replace("_", "-")
                raise ValueError(
                    f"{self.file} was made with --{option} {then}, not {now}: give the same, or another --output"
                )

    def show(self, title: str, pictures: Sequence[np.ndarray | Image.Image]) -> None:
        """Add a column to the sheet."""
        self.columns.append((title, [Image.fromarray(np.asarray(picture)) for picture in pictures[: self.shown]]))

    def row(self, name: str, make: Callable[[], tuple[Figures, Sequence]], shown: str = "") -> Figures:
        """Measure a row, or take it from an earlier run: its figures, and pictures for the sheet.

        make   returns figures, and pictures (may be none)
        shown  the figure that stands above the pictures
        """
        place = self.folder / "pictures" / f"{len(self.rows) if name not in self.rows else [*self.rows].index(name)}.png"
        if name not in self.rows:
            figures, pictures = make()
            if len(pictures):
                column = np.concatenate([np.asarray(picture) for picture in pictures[: self.shown]])
                conditions.save_image(Image.fromarray(column), place)
            self.rows[name] = {key: rounded(float(value)) for key, value in figures.items()}
            self.write()
        figures = self.rows[name]
        if place.is_file():
            column = np.asarray(conditions.load_image(place))
            score = f"\n{shown} {number(shown, figures[shown])}" if shown else ""
            self.show(name + score, [column[y : y + toy.SIZE] for y in range(0, len(column), toy.SIZE)])
        return figures

    def write(self) -> None:
        """Keep what is measured so far, with how it was measured."""
        whose = (resource.RUSAGE_SELF, 1), (resource.RUSAGE_CHILDREN, getattr(self.args, "processes", 0))
        memory = sum(count * resource.getrusage(who).ru_maxrss for who, count in whose) / 1e6
        content = {
            "command": self.command,
            "seed": self.args.seed,
            "commit": self.commit,
            "cpu_seconds": round(self.earlier + cpu_seconds() - self.clock, 1),
            "memory_gb": round(max(self.memory, memory), 2),
            "settings": self.settings,
            "rows": self.rows,
        }
        files.write_json(self.file, content)

    def finish(self) -> None:
        """Draw the sheet, print the table; with --record, keep both in the repository."""
        self.write()  # with what processes took that have ended since
        conditions.save_image(draw_sheet(self.columns, self.below), self.folder / "sheet.png")
        print("\n".join(table(files.read_json(self.file)["rows"])))
        if self.args.record:
            for source, place in ((self.file, RESULTS), (self.folder / "sheet.png", SHEETS)):
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place / f"{self.name}{source.suffix}")


class HeldOut:
    """Held-out scenes with a condition's hints, their captions and seeds, and the bounds between which it is scored.

    condition  one of `conditions.NAMES`; with a pose, scenes with people
    also       further figures of pictures of all the scenes
    training   instead of held-out scenes, this many of the first training scenes
    The bounds are the first two rows: the ceiling is what the autoencoder preserves of the true pictures, the floor what
    the same prompts and seeds reach without control.
    """

    def __init__(
        self, experiment: Experiment, sd: StableDiffusion, condition: str, also: Also | None = None, training: int = 0
    ):
        self.experiment, self.sd, self.condition, self.also = experiment, sd, condition, also
        chosen = (training, "train", condition) if training else (experiment.args.scenes, "test", condition, FIRST)
        self.scenes = list(toy.scenes(*chosen))
        what = f"{condition}, training scenes" if training else condition
        self.hints = recording.stack([scene.hint(condition) for scene in self.scenes]).float() / 255
        self.truths = [Image.fromarray(scene.image) for scene in self.scenes]
        self.possible = measures.prompt_share(self.truths, self.scenes)
        self.judge = judging.Judge.load()
        experiment.show(f"hint\n{what}", [scene.hint(condition) for scene in self.scenes])
        self.first = self.truths not in experiment.bounded  # whose bounds are shown
        experiment.bounded.append(self.truths)
        self.bounds = (f"{what}: without control", f"{what}: true pictures, through the autoencoder")
        experiment.row(self.bounds[1], lambda: self.bound("true", self.through_vae))
        experiment.row(self.bounds[0], lambda: self.bound("plain", self.draw), shown="following")

    def through_vae(self) -> list[Image.Image]:
        latents = recording.encode(self.sd.vae, recording.stack([scene.image for scene in self.scenes]))
        return [image for part in latents.split(BATCH) for image in self.sd.decode_latents(part)]

    def bound(self, which: str, draw: Callable[[], list[Image.Image]]) -> tuple[Figures, list[Image.Image]]:
        """Measure one of the bounds, whose pictures are drawn once for all conditions of the same scenes."""
        drawn, key = self.experiment.drawn, (which, *(f"{scene.split} {scene.index}" for scene in self.scenes))
        if key in drawn:
            return self.figures(drawn[key]), []
        figures, drawn[key] = self.measured(draw)
        return figures, drawn[key] if self.first else []

    def draw(self, net: ControlNet | None = None, **settings) -> list[Image.Image]:
        """Draw each scene from its caption, or what `settings` say, by its own seed; with its hint if there is a net."""
        given = {"prompt": [scene.caption for scene in self.scenes], "hint": self.hints, **settings}
        per_picture, images = ("prompt", "hint"), []
        for i in tqdm(range(0, len(self.scenes), BATCH), desc="drawing", unit="batch", leave=False):
            chunk = {key: given[key][i : i + BATCH] if key in per_picture else given[key] for key in given}
            if net is None:
                del chunk["hint"]
            defaults = {"num_steps": self.experiment.num_steps, "guidance_scale": GUIDANCE, "controlnet": net}
            images += self.sd.generate(**{**defaults, **chunk}, seed=self.experiment.args.seed + i)
        return images

    def measured(self, draw: Callable[[], list[Image.Image]]) -> tuple[Figures, list[Image.Image]]:
        """Draw, and measure what is drawn, with the processor's seconds that a picture took."""
        before = time.process_time()
        images = draw()
        return self.figures(images, (time.process_time() - before) / len(images)), images

    def row(self, name: str, net: ControlNet | None = None, more: Figures | None = None, **settings) -> Figures:
        """Add a row to the experiment: the scenes drawn with a net, and settings of `generate`.

        more  further figures, as "parameters trained" and "training time"
        """

        def make() -> tuple[Figures, list[Image.Image]]:
            figures, images = self.measured(lambda: self.draw(net, **settings))
            return {**figures, **(more or {})}, images

        return self.experiment.row(name, make, shown="following")

    def figures(self, images: list[Image.Image], seconds: float | None = None) -> Figures:
        """Return what every experiment measures of pictures of the scenes, all but the seconds as shares.

        measure         the condition's own, see `measures.measure`
        following       (measure - floor) / (ceiling - floor)
        scene accuracy  the judge's, of all pictures
        prompt          `measures.prompt_share`, relative to the true pictures'
        """
        value = measures.mean(measures.measure(self.condition), images, self.scenes)
        figures = {"measure": value, "following": 1.0}
        if self.bounds[1] in self.experiment.rows:
            floor = self.experiment.rows.get(self.bounds[0], figures)["measure"]
            figures["following"] = measures.score(value, floor, self.experiment.rows[self.bounds[1]]["measure"])
        figures["scene accuracy"] = judging.scene_accuracy(self.judge, images, self.scenes)["all"]
        figures["prompt"] = measures.prompt_share(images, self.scenes) / self.possible if self.possible else 0.0
        if seconds is not None:
            figures["seconds a picture"] = seconds
        return {**figures, **(self.also(images, self.scenes) if self.also else {})}


def things_right(images: Sequence[Image.Image], scenes: Sequence[toy.Scene]) -> Figures:
    """Return the share of pictures that show their scene's things and no other, in whatever colours."""
    judge = judging.Judge.load()
    seen = [sorted(judge.see(image)[0].values()) for image in images]
    right = [found == sorted(thing.kind for thing in s.things) for found, s in zip(seen, scenes, strict=True)]
    return {"things right": sum(right) / len(right)}


def commit() -> str:
    """Return the commit that is measured, with "+" if files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or "unknown"


def rounded(value: float) -> float:
    """Return a figure as it is kept: four digits, of large ones four after the point."""
    return float(f"{value:.4g}") if abs(value) < 1 else round(value, 4)


def number(name: str, value: float) -> str:
    """Write a figure as the tables do: shares with two digits, counts without, gradients with their power of ten."""
    if name.startswith("gradient"):
        return f"{value:.1e}" if value else "0"
    if name.startswith(("parameters", "pictures", "scenes", "step")):
        return f"{value:,.0f}"
    return recording.words(value)


def table(rows: dict[str, Figures]) -> list[str]:
    """Return results as Markdown: a table for each group of rows that share figures, with a column for each figure.

    A table with more figures than fit beside each other, and than rows, is turned.
    """
    groups: list[dict[str, Figures]] = []
    for title, row in rows.items():
        group = next((g for g in groups if any(row.keys() & other.keys() for other in g.values())), None)
        if group is None:
            groups.append(group := {})
        group[title] = row
    lines = []
    for group in groups:
        names = list(dict.fromkeys(name for row in group.values() for name in row))
        cells = [["", *names]]
        for title, row in group.items():
            cells.append([title, *(number(name, row[name]) if name in row else "-" for name in names)])
        if len(names) > max(len(group), WIDEST):
            cells = [list(column) for column in zip(*cells, strict=True)]
        cells.insert(1, ["---"] * len(cells[0]))
        lines += ["", *(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in cells)]
    return lines[1:]


def draw_sheet(columns: list[tuple[str, list[Image.Image]]], below: Image.Image | None = None) -> Image.Image:
    """Draw columns of pictures beside each other, up to WIDE in a band, and a picture below, in 256 colours."""
    side, gap, head = toy.SIZE, 4, 44
    high = max(len(pictures) for _, pictures in columns)
    bands = [columns[i : i + WIDE] for i in range(0, len(columns), WIDE)]
    width = max(len(band) for band in bands) * (side + gap) - gap
    tall = head + high * (side + gap)
    more = below or Image.new("RGB", (0, 0))
    sheet = Image.new("RGB", (max(width, more.width), len(bands) * tall - gap + more.height), "white")
    sheet.paste(more, (0, len(bands) * tall - gap))
    draw = ImageDraw.Draw(sheet)
    for b, band in enumerate(bands):
        top = b * tall
        for i, (title, pictures) in enumerate(band):
            lines = [line for part in title.split("\n") for line in textwrap.wrap(part, 23)]
            draw.text((i * (side + gap) + 2, top + 1), "\n".join(lines[:4]), fill="black", spacing=0)
            for k, picture in enumerate(pictures):
                sheet.paste(picture, (i * (side + gap), top + head + k * (side + gap)))
    return sheet.quantize(256)


def overview(names: Sequence[str]) -> list[str]:
    """Return the lines of the page's first table: each experiment that has results, and what it took."""
    lines = ["| experiment | command | scenes | minutes of one core | memory, GB |", "| --- | --- | --- | --- | --- |"]
    for name in names:
        kept = files.read_json(RESULTS / f"{name}.json")
        minutes, memory = kept["cpu_seconds"] / 60, kept["memory_gb"]
        cells = f"`{kept['command']}` | {kept['settings']['scenes']} | {minutes:.1f} | {memory:.1f}"
        lines.append(f"| [{name}](#{name}) | {cells} |")
    return lines


if __name__ == "__main__":  # prints the tables of README.md
    recorded = sorted(path.stem for path in RESULTS.glob("*.json"))
    print("\n".join(overview(recorded)))
    for each in recorded:
        print(f"\n## {each}\n\n" + "\n".join(table(json.loads((RESULTS / f"{each}.json").read_text("utf-8"))["rows"])))
    sys.exit(0)
