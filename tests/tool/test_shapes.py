"""Every shape that a comment or docstring of minicn states is compared with the tensor or array that it is said of.

Read are comments behind an assignment, a `return` or a field, `h = self.in_layers(x)  # (B, C_out, H, W)`; lines of a
docstring about a parameter or field, `hint  (B, 3, 8h, 8w)  in [0, 1]`; and shapes in a docstring's sentences. Then small
inputs go through every function that states one, while Python's tracing hook compares. A letter stands for one number within
a call; a word (`heads`, `dim`) is an integer among its variables and attributes, if there is one, else like a letter.
"""

import ast
import contextlib
import functools
import io
import json
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import minicn
from minicn import conditions, toy, training
from minicn.commands import check_device
from minicn.commands.condition import look
from minicn.conditions import drawing, making, networks, palettes
from minicn.fast import Conv3x3
from minicn.toy import captioning, judging, measures, sketching
from minicn.trainer import data, examples, pretraining, recording

PACKAGE = Path(minicn.__file__).parent
SHAPE = re.compile(r"(?:(\w+)`? )?\(([^()]*,[^()]*)\)(?: +(u?int\d+|float\d+|bool)\b)?")  # with the words around it
NAME = re.compile(r"(?<![A-Za-z_])(?!(?:or|more|rounded|up)\b)[A-Za-z_]+")
LETTER = re.compile(r"[^\W\d_abjstxyRG](_\w+)?")  # the others are coordinates and colours: (x, y), min(R, G, B)
WORDS = {"dim", "heads", "latent_channels", "new", "points", "seen", "size"}
TOY = {"768": "768 or 96 or 64"}  # the width of the text features: published, of the toy as it is trained and as it ships


@dataclass(frozen=True)
class Claim:
    """That something has one of these shapes."""

    where: str
    shapes: tuple[tuple[tuple[str, ...], str], ...]  # sizes, and a dtype or ""
    names: tuple[str, ...] | None = None  # of what; none: of the result; None: of an argument or the result
    lines: range = range(0)  # of the statement that a comment is behind


def shape(inside: str, dtype: str = "") -> tuple[tuple[str, ...], str]:
    return tuple(size.strip() for size in inside.split(",") if size.strip()), dtype


def docstring_claims(node: ast.AST, parameters: set[str], where: str) -> Iterator[Claim]:
    """Read the docstring of a function, or, without parameters, of a class."""
    for line in re.sub(r"\n +", " ", ast.get_docstring(node) or "").splitlines():  # an indented line goes on with the last
        row = re.match(r"(\w+(?:, \w+)*)  +", line)
        stated: list[tuple[str, list]] = []  # words, and the shapes that follow on each, joined by "or"
        for word, inside, dtype in SHAPE.findall(line):
            made = shape(inside, dtype)
            known = all(LETTER.fullmatch(name) or name in WORDS for name in NAME.findall(inside)) and "0" not in made[0]
            if not known and not ({*"BCHNW"} & {*made[0]} and "R" not in made[0]):
                continue
            if not stated or not (row or word == "or"):
                stated.append((word, []))
            stated[-1][1].append(made)
        for word, shapes in stated:
            names = tuple(row[1].split(", ")) if row else (word,) if word in parameters else None
            text = " or ".join(f"({', '.join(sizes)})" for sizes, _ in shapes)
            of_result = row and parameters and not parameters.issuperset(names)
            yield Claim(f"{where}: {row[1] if row else word} {text}", tuple(shapes), () if of_result else names)


def claims_of(file: Path) -> dict[tuple, list[Claim]]:
    """Collect the claims of a module: of each function, by file and line; of each class's fields, by module and name."""
    found, source = defaultdict(list), file.read_text("utf-8")
    nodes = list(ast.walk(ast.parse(source)))
    functions, classes = ([n for n in nodes if isinstance(n, kind)] for kind in (ast.FunctionDef, ast.ClassDef))
    place = {f: (str(file), min([f.lineno, *(d.lineno for d in f.decorator_list)])) for f in functions}
    module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    place |= {c: (module, c.name) for c in classes}
    for f in functions:
        parameters = {a.arg for a in (*f.args.args, *f.args.kwonlyargs)}
        found[place[f]] += docstring_claims(f, parameters, f"{file.name}:{f.lineno} {f.name}")
    for c in classes:
        claims = list(docstring_claims(c, set(), f"{file.name}:{c.lineno} {c.name}"))
        found[place[c]] += [claim for claim in claims if claim.names]
        family = [d for d in classes if d is c or c.name in map(ast.unparse, d.bases)]
        for f in (f for d in family for f in d.body if getattr(f, "name", "") == "forward"):
            found[place[f]] += [claim for claim in claims if not claim.names]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        comment, line = re.match(r"# \(([^()]*,[^()]*)\)", token.string), token.start[0]
        if comment:
            around = [n for n in nodes if isinstance(n, ast.stmt) and n.lineno <= line <= n.end_lineno]
            node = min(around, key=lambda n: n.end_lineno - n.lineno)
            where = f"{file.name}:{line}: {token.string}"
            assert isinstance(node, (ast.Assign, ast.AnnAssign, ast.Return)), f"{where} is behind no assignment or return"
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            names, lines = tuple(ast.unparse(t) for t in targets if t), range(node.lineno, node.end_lineno + 1)
            is_field = any(node in c.body for c in classes)
            for owner in (n for n in around if n in (classes if is_field else functions)):
                found[place[owner]].append(Claim(where, (shape(comment[1]),), names, range(0) if is_field else lines))
    return found


def condition(size: str) -> str:
    """Write a stated size as Python: "8h" as `size in (8*h,)`, "1 or B" as `size in (1, B,)`, "5 or more" as `size >= 5`."""
    if size.endswith(" or more"):
        return f"size >= {size.removesuffix(' or more')}"
    size = re.sub(r"(.*) rounded up", r"-(-(\1) // 1)", size.replace(" or ", ", ").replace("^", "**"))
    product = re.sub(r"(?<=\w) (?=[A-Za-z])|(?<=\d)(?=[A-Za-z])", "*", size)
    return f"size in ({product},)"


@functools.cache
def agree(stated: frozenset[tuple[str, int]]) -> bool:
    """Tell whether there is a number for each letter with which everything stated has its size."""
    letters: dict[str, int | None] = {}
    for text, size in sorted(stated, key=lambda pair: len(pair[0])):
        new = set(NAME.findall(text)) - letters.keys()
        if text in new or len(new) > 1:  # a letter by itself; or a product of which no factor is known
            if letters.setdefault(text, size) != size:
                return False
            continue
        letter, code = next(iter(new), "_"), compile(condition(text), text, "eval")
        numbers = (n for n in range(4096 if new else 1) if eval(code, {"size": size, **letters, letter: n}))
        letters[letter] = next(numbers, None)
        if letters[letter] is None:
            return False
    return True


def arrays(value) -> list:
    if isinstance(value, (list, tuple)):
        return [array for each in value for array in arrays(each)]
    return [value] if isinstance(value, (Tensor, np.ndarray)) and value.ndim else []


class Watch:
    """Compares the claims of a package with what there is, while code runs."""

    def __init__(self, folder: Path):
        self.claims = {key: claims for file in folder.rglob("*.py") for key, claims in claims_of(file).items()}
        self.stated = {claim.where for claims in self.claims.values() for claim in claims}
        self.met: set[str] = set()
        self.wrong: dict[str, str] = {}  # claim: what came, the first time
        self.kept: list = []  # what `also` names, alive, so that nothing else gets its id

    @contextlib.contextmanager
    def running(self):
        before = sys.gettrace()
        sys.settrace(self.called)
        try:
            yield
        finally:
            sys.settrace(before)

    def called(self, frame, event, _):
        code, owner = frame.f_code, None
        keys = [(code.co_filename, code.co_firstlineno), id(code)]
        if code.co_name in ("__init__", "forward"):
            owner = frame.f_locals.get("self")
            keys += [id(owner)] if code.co_name == "forward" else [(type(owner).__module__, type(owner).__name__)]
        claims = [claim for key in keys for claim in self.claims.get(key, ())]
        return Call(self, frame, claims) if claims else None

    def also(self, function, claims: list[Claim]) -> None:
        """Let claims be about the calls of a function or module that was given to, or made by, who claims it."""
        self.kept.append(function)
        each = [replace(claim, names=None, shapes=(shape,)) for claim in claims for shape in claim.shapes]
        self.claims[id(getattr(function, "__code__", function))] = each


class Call:
    """One call of a function, the tracing function of its frame."""

    def __init__(self, watch: Watch, frame, claims: list[Claim]):
        code = frame.f_code
        self.watch, self.claims = watch, claims
        self.arguments = {n: frame.f_locals[n] for n in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
        self.at = {line: claim for claim in claims for line in claim.lines}
        self.due: Claim | None = None  # of the statement that runs
        self.stated: frozenset[tuple[str, int]] = frozenset()  # sizes, and what they are
        for claim in claims:
            for function in filter(callable, map(self.arguments.get, claim.names or ())):
                watch.also(function, [claim])

    def __call__(self, frame, event, result):
        self.frame, ended = frame, event == "return"
        if self.due and (ended or frame.f_lineno not in self.due.lines):
            self.compare(self.due, frame.f_locals, result)
            self.due = None
        if event == "line":
            self.due = self.at.get(frame.f_lineno)
        if ended and not (result is None and frame.f_code.co_flags & 0x20):  # a generator ends with nothing
            self.end(result)
        return self

    def end(self, result) -> None:
        """Compare the docstring's claims: about parameters and fields, then those that do not say of what."""
        scope = {**getattr(self.frame.f_locals.get("self"), "__dict__", {}), **self.frame.f_locals, **self.arguments}
        for claim in (claim for claim in self.claims if claim.names is not None and not claim.lines):
            with contextlib.suppress(NameError):  # a base class's __init__ ends before the fields are there
                self.compare(claim, scope, result)
        free, made = [claim for claim in self.claims if claim.names is None], arrays(result)
        found = made + arrays([*self.arguments.values()])
        if free and callable(result):
            self.watch.also(result, free)
        elif found:
            fits = self.share(free, found, made, self.stated)
            for claim in free:
                self.note(claim, fits, found)

    def share(self, free: list[Claim], found: list, made: list, stated: frozenset, first: int = 0) -> bool:
        """Tell whether each claim fits one of the arrays found, all with the same letters, and each array made a claim."""
        if first == len(free):
            return all(any(self.fits(claim, array, stated) is not None for claim in free) for array in made)
        after = (self.fits(free[first], array, stated) for array in found)
        return any(self.share(free, found, made, new, first + 1) for new in after if new is not None)

    def compare(self, claim: Claim, scope: dict, result) -> None:
        for array in arrays([eval(name, {}, scope) for name in claim.names] if claim.names else result):
            stated = self.fits(claim, array, self.stated)
            self.note(claim, stated is not None, [array])
            self.stated = self.stated if stated is None else stated

    def note(self, claim: Claim, fits: bool, found: list) -> None:
        if "768" not in str(claim.shapes) or any(768 in array.shape for array in found):  # the toy's 64 are not enough
            self.watch.met.add(claim.where)
        if not fits:
            came = ", ".join(f"{tuple(array.shape)} {array.dtype}" for array in found)
            self.watch.wrong.setdefault(claim.where, f"{came}, after {sorted(self.stated)}")

    def fits(self, claim: Claim, array, stated: frozenset) -> frozenset | None:
        """Return what is stated so far and by the claim's first shape that the array has, or None if it has none of them."""
        for sizes, dtype in claim.shapes:
            there = array.shape
            if sizes[0] == "...":
                sizes, there = sizes[1:], there[1 - len(sizes) :]
            if len(sizes) == len(there) and dtype in ("", str(array.dtype).removeprefix("torch.")):
                pairs = stated | {(TOY.get(s, NAME.sub(self.number, s)), n) for s, n in zip(sizes, there, strict=True)}
                if agree(pairs):
                    return frozenset(pair for pair in pairs if "i" not in NAME.findall(pair[0]))  # i counts, letters stay
        return None

    def number(self, name: re.Match) -> str:
        """Write the integer that a name in a shape stands for here, or the name."""
        local, owner = self.frame.f_locals.get(name[0]), self.frame.f_locals.get("self")
        values = (local, getattr(owner, name[0], None), getattr(getattr(owner, "cfg", None), name[0], None))
        return next((str(value) for value in values if isinstance(value, int)), name[0])


# What is run. Sizes differ where they can, so that no two letters meet one number by chance.


def published_widths(sd: minicn.StableDiffusion):
    """Text, ControlNet and U-Net at full width, on PyTorch's device that holds no numbers."""
    with torch.device("meta"):
        unet, net = minicn.UNet(), minicn.ControlNet()
        full = minicn.StableDiffusion(unet, sd.vae, minicn.TextEncoder(), sd.tokenizer)
        x, t, context = torch.zeros(2, 4, 8, 16), torch.zeros(2), full.encode_prompts(["a red ball"] * 2)
        unet(x, t, context, net(x, torch.zeros(2, 3, 64, 128), t, context))


def drawing_pictures(sd: minicn.StableDiffusion):
    hint = np.zeros((64, 48, 3), np.uint8)
    net = minicn.ControlNet.load("toy-canny")
    sd.encode_images([Image.fromarray(hint)] * 3)
    sd.generate(["a ball", "a cone", "a box"], hint=hint, controlnet=net, num_steps=2, eta=1.0)
    minicn.hint_encoder(5)(torch.zeros(2, 3, 16, 24))
    minicn.zero_linear(4)(torch.zeros(2, 5, 4))
    Conv3x3(720, 700, 3, padding=1)(torch.randn(2, 720, 4, 6)).sum().backward()  # wide enough for MatrixProduct


def trainings(sd: minicn.StableDiffusion, folder: Path):
    scenes, cpu = list(toy.scenes(3)), torch.device("cpu")
    learned = examples.from_scenes(sd, scenes, "canny", torch.arange(len(scenes)))
    batch = learned.batch(seed=0, step=0, size=2, drop_prompt=0.5, device=cpu)
    training.controlnet_loss(sd.unet, minicn.ControlNet.from_unet(sd.unet), batch, sd.alphas_cumprod)
    images = [scene.image for scene in scenes]
    recording.Validation(sd, images, images, [scene.caption for scene in scenes], 1.0, num_steps=1)
    drawn, captions, chances = pretraining.pictures(range(2))
    first, second = (pretraining.Checkpoint(folder / name, name, 9, 0) for name in ("first", "second"))
    latents = recording.encode(pretraining.train_vae(drawn, 2, cpu, first, batch_size=2), drawn)
    pretraining.train_unet(latents, captions, chances, sd.tokenizer, 2, 1, 1e-3, cpu, second)


def judging_pictures():
    judging.Judge().eval().see(toy.scene(0).image)
    captioning.toy_caption(Image.fromarray(toy.scene(1, "test").image))
    check_device.picture(torch.device("cpu"), torch.float32, 1)


def annotating():
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (32, 48, 3), np.uint8)
    conditions.hed(picture, networks.HED())
    networks.MLSD()(picture)
    networks.BodyPose()(picture[:, :3])
    networks.find_people(random.random((38, 32, 48)), random.random((19, 32, 48)))
    lines = np.array([[0, 2, 30, 2], [0, -1, 5, -1], [1, 1, 2, 3]])  # one of them leaves the canvas, one lies outside
    drawing.lines(np.zeros((9, 8, 3), np.uint8), lines, (255, 0, 0))


def hints():
    scene = next(scene for scene in map(toy.scene, range(99)) if len(scene.keypoints))
    sketching.sketch(scene.things, scene.outlines(), scene.owners, seed=0)  # of a person: with stick figures
    for name in conditions.NAMES:
        look(name, scene.hint(name), "this hint")
        measures.measure(name)(scene.image, scene)
    picture = scene.image[:100]
    conditions.canny(picture[..., 0])
    conditions.lineart(picture)
    conditions.fake_scribble(conditions.soft_edges(picture))
    conditions.normal_from_depth(scene.depth[:100])
    conditions.depth(scene.depth[:100])
    conditions.ade20k(scene.labels[:100])
    conditions.coco_stuff(scene.labels[:100])
    conditions.hint_tensor(torch.zeros(2, 3, 8, 16))
    toy.world._shades.__wrapped__()  # else kept from tests before
    palettes._read("ade20k")


def files(folder: Path):
    picture, grey, normals, people, pose = (folder / name for name in ("rgb.png", "grey.png", "n.npy", "a.json", "b.json"))
    Image.new("RGB", (40, 24)).save(picture)
    Image.new("L", (40, 24)).save(grey)
    np.save(normals, np.full((24, 40, 3), 3**-0.5))
    values = [float(i) for i in range(54)]
    people.write_text(json.dumps([{"keypoints": values[:51]}] * 2))
    pose.write_text(json.dumps({"people": [{"pose_keypoints_2d": values}] * 2}))
    making.make("canny", picture, resolution=64)
    conditions.load_hint(picture)
    conditions.read_depth(grey)
    conditions.read_labels(grey)
    conditions.read_normals(normals)
    conditions.read_openpifpaf(people)
    conditions.read_openpose(pose)
    data.write_pairs(folder / "pairs", data.circles(1, size=48))
    conditions.doubts(None, data.load_pair(data.read_pairs(folder / "pairs")[0], 32)[0])


def test_every_stated_shape_is_what_comes(tmp_path):
    """No claim about a shape is wrong, and none was left out."""
    watch = Watch(PACKAGE)
    with watch.running():
        sd = minicn.StableDiffusion.load("toy")
        published_widths(sd)
        drawing_pictures(sd)
        trainings(sd, tmp_path)
        judging_pictures()
        annotating()
        hints()
        files(tmp_path)
    assert watch.wrong == {}
    assert watch.stated - watch.met == set()
