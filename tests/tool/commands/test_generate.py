"""`minicn generate` and `minicn demo` as a newcomer calls them: hints made, fitted and doubted, settings used again."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minicn import StableDiffusion, __main__, toy
from minicn.checkpoints import files, hub
from minicn.conditions import making
from minicn.trainer import pretraining

SCENE = toy.scene(1, "test")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The arguments of each call of `StableDiffusion.generate`, which draws noise here; in a folder of its own."""
    calls = []

    def generate(self, prompt, **settings):
        calls.append(settings | {"prompt": prompt})
        hint = (settings.get("hint") or [Image.new("RGB", (128, 128))])[0]
        noise = np.random.default_rng(len(calls)).integers(0, 255, (hint.height, hint.width, 3), np.uint8)
        return [Image.fromarray(noise)] * settings.get("num_images", 1)

    monkeypatch.setattr(StableDiffusion, "generate", generate)
    monkeypatch.chdir(tmp_path)
    wide = Image.new("RGB", (320, 240), "white")
    wide.paste(Image.fromarray(SCENE.image).resize((240, 240)), (40, 0))
    wide.save("photo.png")
    Image.fromarray(SCENE.hint("canny")).save("hint.png")
    Image.fromarray(toy.drawing(SCENE)).save("drawing.png")
    return calls


def generate(text):
    assert __main__.main(["generate", *shlex.split(text)]) == 0


# The first picture


def test_the_demo_needs_nothing_and_says_what_is_next(tmp_path, monkeypatch, capsys):
    """Hint, picture and truth side by side; the commands that it names are commands."""
    monkeypatch.chdir(tmp_path)
    whole = StableDiffusion.generate
    monkeypatch.setattr(StableDiffusion, "generate", lambda *args, **more: whole(*args, **more | {"num_steps": 1}))
    assert __main__.main(["demo"]) == 0
    sheet = np.asarray(Image.open("demo.png"))[30:]
    assert np.array_equal(sheet[:, :128], SCENE.hint("canny"))
    assert np.array_equal(sheet[:, 264:], SCENE.image)
    assert sheet[:, 132:260].std() > 5
    text = capsys.readouterr().out
    assert SCENE.caption in text
    for command in ("generate --controlnet", "scene"):
        [line] = [line for line in text.splitlines() if f"minicn {command}" in line]
        __main__.parse_args(shlex.split(line.split("   ")[0])[1:])


def test_a_picture_without_a_name_gets_a_new_one(drawn):
    """Nothing that is there is replaced, neither by one picture nor by several."""
    generate("--prompt-setting none")
    generate("--prompt-setting none")
    generate("--prompt-setting none --num-images 2")
    generate("--prompt-setting none --num-images 2")
    names = [path.name for path in Path().glob("out*")]
    assert sorted(names) == ["out-2.png", "out-3-0.png", "out-3-1.png", "out-4-0.png", "out-4-1.png", "out.png"]


def test_the_help_names_all_that_the_toy_knows(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["generate", "--help"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in [*toy.THINGS, *toy.COLOURS, *toy.BACKGROUNDS, *toy.RELATIONS])


# Hints


def test_a_hint_is_made_on_the_way(drawn, capsys):
    """As `minicn condition` makes it, its shorter side that of the model's pictures, as in the official apps."""
    generate("--controlnet toy-canny --hint-from canny --hint photo.png --prompt-setting none")
    [hint] = drawn[0]["hint"]
    assert hint.size == (192, 128)
    assert np.array_equal(hint, making.make("canny", Path("photo.png"), resolution=128)[0])
    assert "hint from photo.png: 192x128 pixels, " in capsys.readouterr().out


def test_hints_of_several_conditions_are_made(drawn):
    two = "--controlnet toy-canny --controlnet toy-scribble --hint photo.png --hint drawing.png"
    generate(f"{two} --hint-from canny --hint-from scribble --fit --prompt-setting none")
    want = [
        making.make(name, Path(f"{of}.png"), size=(128, 128))[0]
        for name, of in (("canny", "photo"), ("scribble", "drawing"))
    ]
    assert all(np.array_equal(*pair) for pair in zip(drawn[0]["hint"], want, strict=True))


@pytest.mark.parametrize(("more", "size"), [("--fit", (128, 128)), ("--fit --width 64", (64, 128))])
def test_hint_image_and_mask_are_fitted(drawn, more, size):
    """Scaled until they cover the size, then cropped in the middle: here to the square that lies in the picture's."""
    pictures = "--hint photo.png --image photo.png --mask photo.png"
    generate(f"--controlnet toy-canny {pictures} {more} --prompt-setting none")
    for picture in (*drawn[0]["hint"], drawn[0]["image"], drawn[0]["mask"]):
        assert picture.size == size
        if size == (128, 128):
            assert abs(np.asarray(picture).astype(int) - SCENE.image).mean() < 3


@pytest.mark.parametrize(
    ("net", "hint", "words"),
    [
        ("toy-scribble", "drawing.png", "mostly white, so it looks inverted: .*; --hint-from scribble makes a hint of it"),
        ("toy-depth", "photo.png", "it is coloured: depth is grey, near is white; --hint-from depth"),
        ("{toy}/canny", "drawing.png", "looks inverted: .*; --hint-from canny"),
        ("toy-canny", "hint.png", None),
    ],
)
def test_a_hint_that_looks_wrong_is_noted(drawn, capsys, net, hint, words):
    generate(f"--controlnet {net.format(toy=hub.TOY_CONTROLNETS)} --hint {hint} --prompt-setting none")
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == bool(words)
    assert not words or re.search(f"note: {hint} may be wrong: .*{words}", notes[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--hint-from canny --prompt x", "--hint-from has no effect without --controlnet"),
        ("--fit --prompt x", "--fit has no effect without --hint or --image"),
        ("--controlnet toy-canny --hint hint.png --hint-from canny --hint-from hed --prompt x", "got 2 --hint-from for 1"),
        ("--controlnet toy-canny --hint none.png --hint-from canny --prompt x", "none.png does not exist"),
        ("--controlnet toy-openpose --hint photo.png --hint-from openpose --prompt x", "is not"),
        ("--prompt x --output a.png --sheet a.png", "--sheet a.png would replace the picture"),
        ("--prompt x --sheet hint.png --image hint.png", "hint.png is also read, and would be lost"),
    ],
)
def test_what_does_not_go_together_is_refused(drawn, refused, options, words):
    assert words in refused(__main__.main, ["generate", *shlex.split(options)])
    assert drawn == []


def test_the_command_line_names_options(tmp_path, monkeypatch, capsys, refused):
    """Where the library says "(--fit, conditions.fit)": with the note on a size, and where a size cannot be drawn."""
    monkeypatch.chdir(tmp_path)
    for side in (64, 100):
        Image.fromarray(SCENE.hint("canny")).resize((side, side), Image.Resampling.NEAREST).save(f"{side}.png")
    draw = ["generate", "--controlnet", "toy-canny", "--prompt", "a red ball", "--num-steps", "1", "--hint"]
    assert __main__.main([*draw, "64.png"]) == 0
    said = capsys.readouterr().err
    assert "note: this model was trained at 128x128 pixels, and 64x64 may come out as nonsense" in said
    said += refused(__main__.main, [*draw, "100.png"])
    assert said.count("(--fit)") == 2
    assert "conditions" not in said
    __main__.main([*draw, "100.png", "--fit"])
    assert Image.open("out-2.png").size == (128, 128)


def test_the_sheet_shows_hint_and_pictures(drawn):
    generate("--controlnet toy-canny --hint hint.png --prompt-setting none --num-images 2 --sheet sheet.png")
    sheet = np.asarray(Image.open("sheet.png"))[30:]
    assert np.array_equal(sheet[:, :128], SCENE.hint("canny"))
    assert np.array_equal(sheet[:, 132:260], Image.open("out-0.png"))
    assert np.array_equal(sheet[:, 264:], Image.open("out-1.png"))


# Settings used again

FIRST = "--controlnet toy-canny --hint hint.png --seed 5 --prompt 'a -- \"red\" ball' --negative-prompt=-x --guess-mode "
FIRST += "--conditioning-scale 0.5 --num-steps 7 --control-end 0.5"


def test_the_settings_of_a_picture_are_used_again(drawn):
    """All that matters for the picture; the guidance scale too, which was the model's own."""
    generate(f"{FIRST} --output first.png")
    generate("--like first.png")
    same = [{k: np.asarray(v) if k == "hint" else str(v) for k, v in call.items() if k != "controlnet"} for call in drawn]
    assert all(np.array_equal(a, b) for a, b in zip(same[0].values(), same[1].values(), strict=True))
    record = json.loads(Image.open("out.png").text["minicn"])
    assert (record["guidance_scale"], record["seed"], record["prompt"]) == (3.0, 5, 'a -- "red" ball')


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("--seed 0", {"seed": 0}),  # the default, given
        ("--prompt b --guidance-scale 1", {"prompt": "b", "guidance_scale": 1.0}),
        ("--prompt-setting none", {"prompt": ""}),
        ("--conditioning-scale 2", {"conditioning_scale": [2.0]}),
        ("--hint drawing.png --hint-from scribble", {"conditioning_scale": [0.5]}),  # in place of the hint, not beside it
    ],
)
def test_what_is_given_beside_like_counts(drawn, given, want):
    generate(f"{FIRST} --output first.png")
    generate(f"{given} --like first.png")
    assert {key: drawn[1][key] for key in want} == want
    assert drawn[1]["num_steps"] == 7
    assert len(drawn[1]["hint"]) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "like.png keeps no settings: name a PNG that minicn wrote"),
        ("[1]", "keeps no settings"),
        ("{", "like.png is not a picture with settings"),
        ('{"steps": 10000, "condition": "canny"}', "like.png keeps the settings of something else"),  # a run's sheet
        (
            '{"command": "generate", "seed": -1, "prompt": "x"}',
            "a setting that does not fit: argument --seed: expected",
        ),
        ('{"command": "generate", "model": {"a": 1}, "prompt": "x"}', "is not a file or folder"),
        ("[" * 5000, "nested more than 32 deep"),
    ],
)
def test_settings_of_a_stranger_are_checked(drawn, refused, text, words):
    """What a picture says is text of unknown origin: the ranges of the options hold for it, too."""
    info = PngInfo()
    if text:
        info.add_text("minicn", text)
    Image.new("RGB", (8, 8)).save("like.png", pnginfo=info)
    assert words in refused(__main__.main, ["generate", "--like", "like.png"])
    assert drawn == []


def test_inspect_says_how_a_picture_was_made(drawn, capsys, refused):
    generate("--prompt 'a red ball' --seed 7")
    assert __main__.main(["inspect", "out.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"prompt: a red ball", "seed: 7", "draw it again: minicn generate --like out.png"} <= {*lines}
    assert "keeps no settings" in refused(__main__.main, ["inspect", "hint.png"])


# The model's own


def test_the_toy_keeps_its_defaults_in_its_folder():
    """Those that its training writes; its words are those of all captions."""
    sd = StableDiffusion.load("toy")
    assert sd.defaults == pretraining.DEFAULTS
    assert {*sd.defaults.words.split()} == {*" ".join([*toy.captions(), *pretraining.NEUTRAL[:3]]).replace(",", "").split()}
    assert files.read_json(hub.TOY_BASE / "minicn.json")["guidance_scale"] == 3


@pytest.mark.parametrize("setting", ["default", "automatic"])
def test_the_default_prompt_is_the_models_own(drawn, monkeypatch, setting):
    """What is captioned for the automatic one, too: see `test_automatic_prompts_caption_a_first_picture`."""
    generate(f"--prompt-setting {setting}")
    assert drawn[0]["prompt"] == "a picture" or setting == "automatic" and callable(drawn[0]["prompt"])
