"""Names of Hugging Face repositories: what lies in the cache loads without a network. Needs the extra `hub`."""

import fnmatch
import shutil

import pytest
import torch

hub_library = pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")

from minicn import ControlNet, StableDiffusion  # noqa: E402
from minicn.checkpoints import hub  # noqa: E402
from minicn.checkpoints.models import load_vae  # noqa: E402


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def put(cache, repository, source, into="."):
    """Lay files out as huggingface_hub does after a download."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("0" * 40)
    target = snapshot / into
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def same(a, b):
    return all(torch.equal(tensor, b.state_dict()[key]) for key, tensor in a.state_dict().items())


def test_models_and_controlnets_load_from_the_cache(cache):
    put(cache, "someone/stable-diffusion", hub.TOY_BASE)
    put(cache, "someone/control", hub.TOY_CONTROLNETS / "canny")
    sd = StableDiffusion.load("someone/stable-diffusion")
    assert same(sd.unet, StableDiffusion.load("toy").unet)
    assert same(ControlNet.load("someone/control", unet=sd.unet), ControlNet.load("toy-canny"))
    assert same(load_vae("someone/stable-diffusion"), sd.vae)


def test_a_file_in_a_repository_loads(cache, tmp_path):
    """owner/name/folder/file, as of repositories that hold many ControlNets."""
    ControlNet.load("toy-canny").save(tmp_path / "net.safetensors")
    put(cache, "someone/many", tmp_path / "net.safetensors", "v1/control_canny.safetensors")
    assert same(ControlNet.load("someone/many/v1/control_canny.safetensors"), ControlNet.load("toy-canny"))


def test_a_file_that_a_repository_lacks_is_named(cache, tmp_path, caplog):
    """Also one whose name is a pattern; nobody waits for the network."""
    (tmp_path / "a.safetensors").touch()
    put(cache, "someone/many", tmp_path / "a.safetensors")
    for name in ("b.safetensors", "[a].safetensors", "*"):
        with pytest.raises(FileNotFoundError) as caught:
            ControlNet.load(f"someone/many/{name}")
        assert f"someone/many holds no {name}, or it is not in the cache" in str(caught.value)
    assert not caplog.records


def test_an_old_repository_without_safetensors_loads(cache, tmp_path):
    net = ControlNet.load("toy-canny")
    net.save(tmp_path / "folder", layout="diffusers")
    path = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    from minicn.checkpoints import files

    torch.save(files.read(path), path.with_suffix(".bin"))
    path.unlink()
    put(cache, "someone/old", tmp_path / "folder")
    assert same(ControlNet.load("someone/old"), net)


def test_each_part_of_a_repository_has_its_own_kind_of_file(cache, tmp_path, monkeypatch):
    """The U-Net .safetensors, the autoencoder .bin alone; the safety checker, which is not used, is not fetched."""
    from minicn.checkpoints import files

    shutil.copytree(hub.TOY_BASE, tmp_path / "sd")
    path = tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(files.read(path), path.with_suffix(".bin"))
    path.unlink()
    put(cache, "someone/mixed", tmp_path / "sd")
    asked, fetch = [], hub.fetch_folder
    monkeypatch.setattr(
        hub, "fetch_folder", lambda name, patterns, *rest: asked.extend(patterns) or fetch(name, patterns, *rest)
    )
    assert same(StableDiffusion.load("someone/mixed").vae, StableDiffusion.load("toy").vae)
    assert "vae/diffusion_pytorch_model*" in asked
    assert "unet/diffusion_pytorch_model*" not in asked
    assert not any(fnmatch.fnmatch("safety_checker/model.safetensors", pattern) for pattern in asked)


def test_a_single_file_takes_the_cached_tokenizer(cache, tmp_path):
    """openai/clip-vit-large-patch14 in the cache serves files that carry no tokenizer."""
    sd = StableDiffusion.load("toy")
    sd.save(tmp_path / "model.safetensors", layout="ldm")
    with pytest.raises(FileNotFoundError, match="carries no tokenizer"):
        StableDiffusion.load(tmp_path / "model.safetensors")
    put(cache, hub.CLIP_TOKENIZER, hub.TOY_BASE / "tokenizer")
    loaded = StableDiffusion.load(tmp_path / "model.safetensors")
    assert loaded.tokenizer.vocab == sd.tokenizer.vocab


def test_what_is_not_cached_says_so_in_one_line(cache):
    for name in ("someone/nothing", "someone/nothing/file.safetensors"):
        with pytest.raises(FileNotFoundError, match="not in the cache, and cannot be fetched") as caught:
            StableDiffusion.load(name)
        assert "someone/nothing" in str(caught.value)
        assert "\n" not in str(caught.value)
