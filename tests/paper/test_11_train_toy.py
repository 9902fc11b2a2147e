"""Training, as a person starts it: a few steps of train_toy.py on the Stable Diffusion that ships."""

import csv

import pytest
import torch
from by_hand import same, tensors, zero_convs
from PIL import Image

import train_toy
from minicn import ControlNet, StableDiffusion

SHORT = "--scenes 4 --batch-size 1 --pictures 1 --guidance-scale 1 --score-every 2 --device cpu".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, the ControlNet as it started, and the models as the run left them."""
    folder, seen = tmp_path_factory.mktemp("run") / "four", {}

    class Spied(train_toy.Progress):
        def __init__(self, run, sd, net, *args, **kwargs):
            seen.update(sd=sd, net=net, start=tensors(net))
            super().__init__(run, sd, net, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_toy, "Progress", Spied)
        assert train_toy.main([*SHORT, "--steps", "4", "--output", str(folder)]) == 0
    return folder, seen


def test_every_weight_of_the_controlnet_moved(run):
    """From the zero convolutions to the hint encoder's first layer, and by gradients, not by AdamW's decay alone."""
    folder, seen = run
    assert not any(seen["start"][f"zero_convs.{i}.0.weight"].any() for i in range(12))
    assert all(p.any() for zero in zero_convs(seen["net"]) for p in zero.parameters())
    assert [name for name, p in seen["net"].named_parameters() if torch.equal(p, seen["start"][name])] == []
    optimizer = torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]
    assert [bool(moments["exp_avg"].any()) for moments in optimizer["state"].values()] == [True] * 340


def test_the_locked_model_is_as_it_ships(run):
    """U-Net, autoencoder and text encoder are those of the folder, bit for bit, and took no gradient."""
    _, seen = run
    ships = StableDiffusion.load("toy")
    for part in ("unet", "vae", "text_encoder"):
        assert same(tensors(getattr(seen["sd"], part)), tensors(getattr(ships, part))), part
    assert all(p.grad is None for p in seen["sd"].unet.parameters())


def test_log_sheet_and_weights_are_there(run):
    """A row of the log and a column of the sheet for each look, and the trained weights, which load."""
    folder, seen = run
    rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    assert [float(row["loss"]) > 0 for row in rows] == [False, True, True]  # nothing was trained before step 0
    assert float(rows[0]["score"]) == 0  # eq. (4): before training the ControlNet changes nothing
    assert Image.open(folder / "sheet.png").size == (5 * 132 - 4, 30 + 128)  # hint, truth, three looks
    net = ControlNet.load(folder / "controlnet.safetensors", unet=StableDiffusion.load("toy").unet)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), seen["net"].parameters(), strict=True))
