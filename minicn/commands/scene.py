"""`minicn scene`: a scene of the toy world as files, with everything that is known about it."""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from minicn import conditions, toy
from minicn.checkpoints import files
from minicn.commands import cli


def scene_options(command: argparse.ArgumentParser) -> None:
    command.description = f"{command.description}. `minicn condition` makes the same hints from these files."
    command.add_argument("number", type=cli.whole(0, 2**53), help="of the scene, 0 and up")
    command.add_argument(
        "--split", choices=("train", "test"), default="test", help="test: no model here has learned from it"
    )
    command.add_argument("--output", type=Path, required=True, help="new folder for the files")


def scene(args: argparse.Namespace) -> None:
    cli.check_folder(args.output)
    found = toy.scene(args.number, args.split)
    names = write(found, args.output)
    print(f"{args.output}: {found.caption}")
    print(", ".join(names))


def write(scene: toy.Scene, folder: Path) -> list[str]:
    """Write what is known of a scene into a new folder, all or nothing; return the names.

    Depth (larger is nearer) and normals (x right, y up, z towards the viewer) are arrays, labels grey pictures in each data
    set's own numbering, key points the files of OpenPose and OpenPifPaf.
    """
    pictures = {"picture.png": scene.image, "drawing.png": toy.drawing(scene)}
    pictures |= {f"labels_{name}.png": scene.classes(name) for name in ("ade20k", "coco_stuff")}
    pictures |= {f"hints/{name}.png": scene.hint(name) for name in conditions.NAMES}
    arrays = {"depth.npy": scene.depth, "normals.npy": scene.normals}
    points = np.round(scene.keypoints.astype(float), 2)
    height, width = scene.depth.shape
    texts = {
        "caption.txt": scene.caption,
        "openpose.json": json.dumps(
            {
                "canvas_width": width,
                "canvas_height": height,
                "people": [{"pose_keypoints_2d": person.ravel().tolist()} for person in points],
            }
        ),
        "openpifpaf.json": json.dumps([{"keypoints": p[list(toy.COCO_POINTS)].ravel().tolist()} for p in points]),
    }
    with files.new_folder(folder) as new:
        for name, pixels in pictures.items():
            conditions.save_image(Image.fromarray(pixels), new / name)
        for name, array in arrays.items():
            np.save(new / name, array)
        for name, text in texts.items():
            (new / name).write_text(text + "\n", "utf-8")
    return [*pictures, *arrays, *texts]
