"""Files of strangers: whatever they hold, they are read as they mean, or refused in one line, at a cost of their size."""

import copy
import dataclasses
import json
import pickle
import re
import struct
import tarfile
import time
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from minicn import ControlNet, StableDiffusion, UNet, UNetConfig
from minicn.checkpoints import configs, converting, files, hub, models, pickles, weights
from minicn.clip import TextConfig
from minicn.conditions import networks
from minicn.inputs import Defaults
from minicn.vae import VAEConfig

# Configurations

TABLES = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": TextConfig}
NUMBERS = [(kind, name) for kind, cfg in TABLES.items() for name in (f.name for f in dataclasses.fields(cfg))]


def test_every_number_of_a_configuration_has_a_range():
    """A field that is added to a configuration, and decides what is built, needs a line in the table."""
    own = {field.name for field in dataclasses.fields(Defaults)}
    assert {name for _, name in NUMBERS} | {"hint_channels"} | own == configs.RANGES.keys()


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"guidance_scale": -1}, "guidance_scale -1, but expected a number from 0 to 100"),
        ({"guidance_scale": True}, "guidance_scale True"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan"),
        ({"guidance_scale": "3"}, "guidance_scale '3'"),
        ({"default_prompt": 3}, "default_prompt 3, but expected text of 0 to 1000 characters"),
        ({"default_prompt": "a" * 1001}, "default_prompt"),
        ({"words": ["ball"]}, r"words \['ball'\], but expected text of 0 to 10000 characters"),
        ({"seed": 1}, "'seed', which is no field of a Defaults"),
        ([], r"is not a JSON configuration: expected an object"),
    ],
)
def test_defaults_of_a_strangers_model_are_checked(tmp_path, written, words):
    (tmp_path / "minicn.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=rf"minicn\.json (has )?{words}"):
        models.read_defaults(tmp_path)


@pytest.mark.parametrize("value", [0, -1, 10**400, 2.5, "2", None, True, [2], float("nan"), {}], ids=lambda v: str(v)[:9])
@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_numbers_out_of_range_and_of_other_types_are_named(kind, name, value):
    """In minicn's own metadata and in what comes from shapes; True and 2.0 are no integers, 2.5 is a scaling factor."""
    if (name, value) == ("scaling_factor", 2.5):
        return
    with pytest.raises(ValueError, match=rf"^file has {name} .*expected"):
        configs.checked(TABLES[kind], {name: value}, "file")


@pytest.mark.parametrize("widths", [(), (1,) * 9, (1, 2, 0, 4), (1, 2, 4.0, 4), [1, 2, 4, 4], "1244"])
def test_lists_of_widths_are_checked(widths):
    for config_class, name in ((UNetConfig, "channel_mult"), (VAEConfig, "channels")):
        with pytest.raises(ValueError, match=f"^file has {name} .*expected 1 to 8 integers from 1 to"):
            configs.checked(config_class, {name: widths}, "file")


def test_what_does_not_divide_is_named():
    for config_class, found, words in (
        (UNetConfig, {"num_heads": 7}, r"num_heads 7, but expected a divisor of \[320, 640, 1280, 1280\]"),
        (UNetConfig, {"norm_num_groups": 64 * 9}, "norm_num_groups 576, but"),
        (UNetConfig, {"model_channels": 33, "num_heads": 1, "norm_num_groups": 1}, "model_channels 33, .* an even number"),
        (VAEConfig, {"channels": (32, 33, 64, 64)}, "norm_num_groups 32, but"),
        (TextConfig, {"num_heads": 5}, r"num_heads 5, but expected a divisor of \[768\]"),
        (UNetConfig, {"depth": 3}, "'depth', which is no field of a UNetConfig"),
    ):
        with pytest.raises(ValueError, match=f"^file has {words}"):
            configs.checked(config_class, found, "file")


@pytest.fixture(scope="module")
def toy():
    return StableDiffusion.load("toy")


@pytest.fixture(scope="module")
def ldm(toy, tmp_path_factory):
    """The toy's file, its header and its bytes."""
    path = tmp_path_factory.mktemp("toy") / "toy.safetensors"
    toy.save(path, layout="ldm")
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    return path, json.loads(raw[8:start]), raw[start:]


def with_header(path, header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("unet", "num_heads", -2),
        ("unet", "channel_mult", [1] * 10**5),
        ("unet", "num_res_blocks", 10**7),
        ("vae", "scaling_factor", 1e-320),
        ("text_encoder", "num_layers", 10**9),
        ("text_encoder", "norm", 3),
    ],
)
def test_metadata_is_no_more_trusted_than_a_configuration(ldm, tmp_path, kind, field, value):
    _, header, body = ldm
    good = json.loads(header["__metadata__"]["minicn"])
    changed = {"minicn": json.dumps(good | {kind: good[kind] | {field: value}})}
    path = with_header(tmp_path / "changed.safetensors", header | {"__metadata__": changed}, body)
    with pytest.raises(ValueError, match=rf"changed\.safetensors has '?{field}"):
        StableDiffusion.load(path, tokenizer="toy")


def test_metadata_nested_without_end_is_refused(ldm, tmp_path):
    _, header, body = ldm
    path = with_header(tmp_path / "deep.safetensors", header | {"__metadata__": {"minicn": '{"a":' * 99_999}}, body)
    with pytest.raises(ValueError, match=r"deep\.safetensors has metadata of minicn that cannot be read"):
        StableDiffusion.load(path, tokenizer="toy")


UNHEARD = {
    "unet": [
        ({"transformer_layers_per_block": [1, 1, 2, 2]}, "transformer_layers_per_block"),
        ({"down_block_types": ["DownBlock2D"] * 4}, "down_block_types"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim 256"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"block_out_channels": {"a": 1}}, "block_out_channels"),
        ({"block_out_channels": [32, 64, 128, 100]}, "block_out_channels"),
    ],
    "vae": [({"shift_factor": 0.1}, "shift_factor 0.1"), ({"use_quant_conv": False}, "use_quant_conv False")],
    "text_encoder": [
        ({"hidden_size": "64"}, "hidden_size '64'"),
        ({"text_config": "x"}, "text_config 'x'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps"),
    ],
    "scheduler": [
        ({"beta_schedule": "linear"}, "beta_schedule 'linear'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
        ({"trained_betas": [0.1] * 1000}, "trained_betas"),
        ({"num_train_timesteps": 500}, "num_train_timesteps 500"),
        ({"beta_end": None}, "no beta_end"),
    ],
}


@pytest.mark.parametrize(("part", "change", "words"), [(part, *case) for part, cases in UNHEARD.items() for case in cases])
def test_a_setting_is_honoured_or_refused_by_name(tmp_path, part, change, words):
    """diffusers would build another model, or follow another noise schedule."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    config = json.loads((hub.TOY_BASE / part / name).read_text()) | change
    (tmp_path / part).mkdir()
    (tmp_path / part / name).write_text(json.dumps(config))
    read = {"unet": configs.read_unet, "vae": configs.read_vae, "text_encoder": configs.read_text}.get(part)
    with pytest.raises(ValueError, match=rf"{part}.{name} has {words}"):
        read(tmp_path / part / name) if read else configs.check_scheduler(tmp_path)


def test_settings_of_another_sampler_are_remarked_on(tmp_path):
    """A model is drawn with minicn's DDIM, whatever sampler its folder was saved with; what differs is said."""
    (tmp_path / "scheduler").mkdir()
    config = configs.SCHEDULER_CONFIG | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"has timestep_spacing 'trailing' \('leading'\); minicn samples as DDIM does"):
        configs.check_scheduler(tmp_path)


def test_convert_does_not_lose_a_noise_schedule(toy, tmp_path):
    toy.save(tmp_path / "m")
    path = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(configs.SCHEDULER_CONFIG | {"prediction_type": "v_prediction"}))
    with pytest.raises(ValueError, match="has prediction_type 'v_prediction'"):
        converting.convert(tmp_path / "m", tmp_path / "m.safetensors", "ldm")


def test_numpys_integers_are_written_as_integers(tmp_path):
    """A configuration of them builds the same model; JSON does not know them."""
    cfg = UNetConfig(*(np.int64(n) for n in (4, 4, 8)), (np.int32(1), 2), np.int64(1), 2, 12, np.int16(2))
    converting.save_model("unet", UNet(cfg), tmp_path / "u.safetensors", "ldm")
    again = models.load_model("unet", weights.contents(files.open_weights(tmp_path / "u.safetensors")))
    assert again.cfg == UNetConfig(4, 4, 8, (1, 2), 1, 2, 12, 2)


# ControlNets


@pytest.mark.parametrize("name", ["canny_reshuffled_data.pth", "shuffle.pth", "control_v11e_sd15_shuffle_mine.pth"])
def test_the_meaning_of_a_file_is_not_in_a_part_of_its_name(controlnet, tmp_path, name):
    """Only the published shuffle, by its whole name, is averaged over all positions, and that is said."""
    controlnet.save(tmp_path / "net.safetensors")
    state = {f"control_model.{key}": tensor for key, tensor in controlnet.state_dict().items()}
    for file in (name, "control_v11e_sd15_shuffle.pth"):
        torch.save(state, tmp_path / file)
    hints = [
        models._hint_fields(weights.contents(files.open_weights(tmp_path / file)), {}, tmp_path / file)
        for file in ("net.safetensors", name)
    ]
    assert [one["global_pool"] for one in hints] == [False, False]
    path = tmp_path / "control_v11e_sd15_shuffle.pth"
    with pytest.warns(UserWarning, match="has the name of v1.1's shuffle: its residuals are averaged"):
        assert models._hint_fields(weights.contents(files.open_weights(path)), {}, path)["global_pool"] is True


@pytest.mark.parametrize(
    "change",
    [
        {"global_pool_conditions": "yes"},
        {"controlnet_conditioning_channel_order": "grb"},
        {"conditioning_embedding_out_channels": [16, 32, 96, 128]},
        {"conditioning_channels": 4},
    ],
)
def test_how_a_controlnet_takes_its_hint_is_checked(controlnet, tmp_path, change):
    controlnet.save(tmp_path / "net", layout="diffusers")
    path = tmp_path / "net" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"down_block_types": None} | change))
    with pytest.raises(ValueError, match=f"net.* has ({next(iter(change))}|global_pool) "):
        ControlNet.load(tmp_path / "net")


# Pickles


def zipped(path, pickled, **records):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", content)
    return path


def nested_tuples(levels):
    """A dictionary with a key of tuples of two of the last tuple: 2 ** levels of them to hash."""
    return b"\x80\x02}(" + b"K\x00" + b"2\x86" * levels + b"K\x01u."


STRING = b"X\x01\x00\x00\x00a"
AGAIN = b"\x80\x02]q\x00(" + (STRING + STRING + b"\x86") * 20_000 + b"e"  # a list of 20,000 pairs, kept as number 0
CALL = b"ccollections\nOrderedDict\nq\x010h\x01h\x00\x85R"  # ... made a dictionary
BOMBS = {
    "a memo of 8 GB": b"\x80\x02cos\nsystem\n0]r" + struct.pack("<I", 5 * 10**8) + b".",
    "an array of 1 TB": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "keys of tuples": nested_tuples(60),
    "sets of tuples": b"\x80\x04\x8f(K\x00" + b"2\x86" * 60 + b"\x90.",
    "frozen sets of tuples": b"\x80\x04(K\x00" + b"2\x86" * 60 + b"\x91.",
    "lists in lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "tuples in tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "a long number": b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "the same again and again": AGAIN + CALL + b"0h\x01h\x00\x85R" * 5_000 + b".",
    "a call of what is no function": b"\x80\x02K\x01)R.",
    "a stack that is too short": b"\x80\x02R.",
    "an extension": b"\x80\x02\x82\x01.",
    "a program's name": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
}


def test_tuples_are_no_keys():
    """Nor is anything else of a file of which the hash would take longer than it has bytes."""
    with pytest.raises(TypeError, match="unhashable"):
        hash(pickles.Row([1, 2]))


def old_container(path, pickled, *after):
    """Write what PyTorch wrote before zips: three pickles, that of the tensors, the storages' names, the storages."""
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})]
    path.write_bytes(b"".join([*parts, pickled.replace(b"tQ", b"NtQ"), *after]))  # a storage may be a view there
    return path


@pytest.mark.parametrize("what", BOMBS)
def test_a_pickle_costs_its_size(tmp_path, what):
    """Instructions that reserve, repeat, or nest; each is refused, and at once."""
    path, start = zipped(tmp_path / "bomb.pth", BOMBS[what]), time.process_time()
    with pytest.raises(ValueError, match=r"bomb\.pth (is not a complete PyTorch file|holds no dictionary of tensors)"):
        files.open_weights(path)
    assert time.process_time() - start < 3  # seconds, where minutes or gigabytes were asked for


def test_the_old_container_is_no_more_trusted(tmp_path):
    """The names of storages come in a pickle of their own, and PyTorch looks them up: these would take for ever to hash."""
    names = nested_tuples(60).replace(b"}(", b"](").replace(b"K\x01u.", b"e.")
    for content in ((nested_tuples(60),), (b"\x80\x02}.", names), (tensors((storage(numbers=10**12), (4,), (1,))),)):
        path = old_container(tmp_path / "bomb.pth", *content)
        with pytest.raises(ValueError, match=r"bomb\.pth (is not a complete PyTorch file|holds no dictionary of tensors)"):
            files.open_weights(path)


def test_a_tar_is_not_unpacked(tmp_path, monkeypatch):
    """PyTorch's oldest container is a tar, which it would unpack: links, pipes, files full of holes."""
    name, opened = pickle.dumps(0x1950A86A20F9469CFC6C, 2).decode("latin-1"), []
    with tarfile.open(tmp_path / "x.pth", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(name))
    assert (tmp_path / "x.pth").read_bytes()[:2] == b"\x80\x02"
    monkeypatch.setattr(tarfile, "open", lambda **_: opened.append(1))
    with pytest.raises(ValueError, match=r"x\.pth is not a complete PyTorch file"):
        files.open_weights(tmp_path / "x.pth")
    assert not opened


def test_what_a_reader_quotes_from_a_file_is_text(tmp_path):
    """PyTorch names the storage that it misses; a file may call it what it likes."""
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pth")
    raw = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(raw.replace(b"X\1\0\0\x000q", b"X\1\0\0\0\x1bq"))
    with pytest.raises(ValueError, match=r"x\.pth is not a complete PyTorch file \(.*data/\\x1b"):
        files.open_weights(tmp_path / "x.pth")


def text(content):
    return b"X" + struct.pack("<I", len(content)) + content


def whole(number):
    return b"\x8a\x08" + struct.pack("<q", number)


ZERO = text(b"0")


def storage(name=ZERO, numbers=4):
    """Pickled: a storage of numbers in float32, by its name."""
    return b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + name + text(b"cpu") + whole(numbers) + b"tQ"


def tensors(*made):
    """Pickled: a dictionary of tensors, each of a storage, a size and a stride."""
    out = b"\x80\x02}("
    for i, (where, size, stride) in enumerate(made):
        size, stride = (b"(" + b"".join(map(whole, row)) + b"t" for row in (size, stride))
        out += text(b"%d" % i) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + where + b"K\x00" + size + stride + b"\x89}tR"
    return out + b"u."


CLAIMS = {
    "one number 10**13 times": (tensors((storage(), (10**7, 10**6), (0, 0))), "bytes, but claims tensors of 40,000,000"),
    "one tensor many times": (tensors(*[(storage(ZERO, 1024), (1024,), (1,))] * 26), "bytes, but claims tensors of 106,496"),
    "numbers behind its storage": (tensors((storage(), (5,), (1,))), "is not a complete PyTorch file"),
    "a size below 0": (tensors((storage(), (-1,), (1,))), "is not a complete PyTorch file"),
    "a storage of 4 TB": (tensors((storage(numbers=10**12), (4,), (1,))), "would have 4,000,000,000,000 bytes, but it has"),
    "storages that are too many": (
        tensors(*[(storage(text(b"%d" % i), 600), (4,), (1,)) for i in range(9)]),
        "would have 7,200",
    ),
    "a storage's name that is a number": (tensors((storage(whole(0)), (4,), (1,))), "instructions that weights do not"),
}


@pytest.mark.parametrize("what", CLAIMS)
def test_tensors_have_no_more_bytes_than_their_file(tmp_path, what):
    pickled, words = CLAIMS[what]
    path = zipped(tmp_path / "x.pth", pickled, **{f"data/{i}": bytes(0 if i else 4096) for i in range(9)})
    with pytest.raises(ValueError, match=rf"x\.pth .*{words}"):
        files.open_weights(path)


def test_tensors_written_by_hand_are_read(tmp_path):
    """The files above are refused for what they claim, not for how they are written."""
    data = {"data/0": struct.pack("<4f", 1, 2, 3, 4)}
    path = zipped(tmp_path / "x.pth", tensors((storage(), (2, 2), (2, 1)), (storage(), (4,), (1,))), **data)
    assert files.read(path)["0"].tolist() == [[1, 2], [3, 4]]
    after = pickle.dumps(["0"], 2) + struct.pack("<q", 4) + data["data/0"]
    path = old_container(tmp_path / "old.pth", tensors((storage(), (2, 2), (2, 1))), after)
    assert files.read(path)["0"].tolist() == [[1, 2], [3, 4]]


def test_records_of_a_zip_that_overlap_are_refused(tmp_path):
    """A thousand names for one record of a megabyte."""
    path = zipped(tmp_path / "x.pth", tensors((storage(), (4,), (1,))), **{"data/0": bytes(2**16)})
    with zipfile.ZipFile(path, "a") as archive:
        one = archive.getinfo("archive/data/0")
        for i in range(1, 100):
            again = copy.copy(one)
            again.filename = f"archive/data/{i}"
            archive.filelist.append(again)
        archive._didModify = True
    with pytest.raises(ValueError, match=r"x\.pth has records that overlap"):
        files.open_weights(path)


def test_a_pickle_without_end_and_a_program_are_refused(tmp_path):
    path = zipped(tmp_path / "x.pth", b"\x80\x02" + b"]0" * 2**21 + b"].")
    with pytest.raises(ValueError, match=r"x\.pth has more than 4 MB beside its tensors"):
        files.open_weights(path)
    torch.jit.save(torch.jit.script(torch.nn.Identity()), tmp_path / "program.pth")
    with pytest.raises(ValueError, match=r"program\.pth is (a TorchScript program|compressed)"):
        files.open_weights(tmp_path / "program.pth")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.bool]
)
@pytest.mark.parametrize("new", [True, False])
def test_every_precision_is_read_as_pytorch_reads_it(tmp_path, dtype, new):
    """Also parameters, tensors with attributes of their own, and views."""
    plain = torch.tensor([[0, 1], [1, 0], [1, 1]]).to(dtype)
    if not new and dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16):
        return  # newer than the old container, in which PyTorch itself does not find them again
    marked = plain.clone()
    marked.note = "kept by torch.save"
    made = {"plain": plain, "marked": marked, "view": plain.t(), "row": plain[1:]}
    made |= {"parameter": torch.nn.Parameter(plain, requires_grad=False)} if dtype.is_floating_point else {}
    torch.save({"state_dict": made}, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    there = files.read(tmp_path / "x.pth")
    assert all(torch.equal(there[name].float(), made[name].float()) and there[name].dtype == dtype for name in made)


# Headers and names


def test_names_cost_their_length(tmp_path):
    """300,000 dots, and thousands of names of dots: the longest prefix in a table of names has a few."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    start = time.process_time()
    path = with_header(tmp_path / "x.safetensors", {"control_model." + "." * 300_000: entry}, bytes(4))
    with pytest.raises(ValueError, match=r"x\.safetensors holds a tensor named 'control_model\.\.\.\.+, as no weight is"):
        files.open_weights(path)
    names = ["control_model." + "." * 480, *(f"first_stage_model.attentions.{'.' * 460}{i}" for i in range(3000))]
    header = {name: entry | {"data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    found = weights.contents(files.open_weights(with_header(path, header, bytes(4 * len(names)))))
    assert {kind: len(keys) for kind, keys in found.parts.items()} == {"controlnet": 1, "vae": 3000}
    assert time.process_time() - start < 2


def test_a_header_has_a_size(tmp_path):
    path = with_header(tmp_path / "x.safetensors", b"{" + b" " * 2**24 + b"}", b"")
    with pytest.raises(ValueError, match=r"x\.safetensors is not a complete .safetensors file \(a header of more than 4 MB"):
        files.open_weights(path)


@pytest.mark.parametrize("names", [{"x": "a.json", "y": "b.json"}, {"x": "m.safetensors.index.json"}, {"x": "n\0.json"}])
def test_an_index_of_shards_names_no_index(tmp_path, names):
    """Two that name each other, or one that names itself, would be opened without end."""
    for file in ("a.json", "b.json", "m.safetensors.index.json"):
        (tmp_path / file).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=r"m\.safetensors\.index\.json names .*another index: not opened"):
        files.open_weights(tmp_path / "m.safetensors.index.json")


def test_a_tensor_that_is_held_twice_is_named(ldm, tmp_path):
    state = {"zero_convs.0.0.weight": torch.ones(1), "module.zero_convs.0.0.weight": torch.zeros(1)}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors holds zero_convs\.0\.0\.weight twice, as module\."):
        ControlNet.load(tmp_path / "x.safetensors")


ODD_NAME = "\x1b[31m\u202e" + "x" * 3000


def named(path, how):
    """Write a file of weights in which the name of something is no text."""
    if how in ("tensor", "overlap"):
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        with_header(path, {ODD_NAME: entry} | ({"b": entry} if how == "overlap" else {}), bytes(4))
    elif how in ("shard", "key of a shard"):
        torch.save({"a": torch.zeros(1)}, path.with_name("a.pth"))
        path.write_text(json.dumps({"weight_map": {ODD_NAME: ODD_NAME if how == "shard" else "a.pth"}}))
    else:
        torch.save({ODD_NAME: torch.zeros(2).to_sparse() if how == "odd tensor" else torch.zeros(2)}, path)
    return path


@pytest.mark.parametrize("how", ["tensor", "overlap", "shard", "key of a shard", "odd tensor", "plain tensor"])
def test_names_in_errors_are_text_also_from_python(tmp_path, how):
    """Control characters are escaped, and long names cut, by whatever opens the file."""
    path = named(tmp_path / ("m.safetensors.index.json" if "shard" in how else "x.pth"), how)
    for read in (files.read, ControlNet.load, lambda path: [*converting.describe(path)], networks.HED.load):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}") as said:
            read(path)
        assert str(said.value).isprintable()
        assert len(str(said.value)) < len(str(path)) + 600


# What is there besides, and what is not


@pytest.mark.parametrize("prefix", ["cond_stage_model.transformer.", ""])
def test_what_nobody_needs_is_left_aside(toy, ldm, tmp_path, prefix):
    """CLIP's projections and its tower for pictures, in a single file and in a folder."""
    extra = ("text_projection.weight", "visual_projection.weight", "logit_scale", "vision_model.layers.0.weight")
    state = {prefix + name: torch.ones(2, 2) for name in extra}
    if prefix:
        path = tmp_path / "m.safetensors"
        safetensors.torch.save_file(
            files.read(ldm[0]) | state, path, {"minicn": json.loads(json.dumps(ldm[1]))["__metadata__"]["minicn"]}
        )
    else:
        path = tmp_path / "m"
        toy.save(path)
        one = path / "text_encoder" / "model.safetensors"
        safetensors.torch.save_file(files.read(one) | state, one)
    loaded = StableDiffusion.load(path, tokenizer="toy")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.text_encoder.parameters(), toy.text_encoder.parameters(), strict=True)
    )


def test_convert_names_the_part_that_is_not_there(toy, ldm, tmp_path):
    state = {key: tensor for key, tensor in files.read(ldm[0]).items() if not key.startswith("first_stage_model.")}
    safetensors.torch.save_file(state, tmp_path / "novae.safetensors")
    with pytest.raises(ValueError, match=r"novae\.safetensors holds no autoencoder, only: .* \(--part names one"):
        converting.convert(tmp_path / "novae.safetensors", tmp_path / "out", "diffusers")
    with pytest.raises(ValueError, match="text_encoder holds a text encoder alone"):
        converting.convert(hub.TOY_BASE / "text_encoder", tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


# Compared, moved, added


def changed(ldm, tmp_path, **more):
    """Write the toy's U-Net with some tensors exchanged, added, or (None) left out."""
    state = {
        key.removeprefix("model.diffusion_model."): t for key, t in files.read(ldm[0]).items() if "diffusion_model" in key
    }
    state = {key: t for key, t in (state | more).items() if t is not None}
    torch.save({f"model.diffusion_model.{key}": t for key, t in state.items()}, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


ODD = {
    "more": ({"foo": torch.zeros(3)}, "foo: is in the file alone"),
    "less": ({"out.2.weight": None}, "out.2.weight: is not in the file"),
    "of another shape": ({"out.2.weight": torch.zeros(5, 5, 5)}, r"out.2.weight: .*has shape \(5, 5, 5\), but expected"),
    "NaN": ({"out.2.bias": torch.full((4,), torch.nan)}, "out.2.bias: holds NaN or infinite values"),
    "infinite": ({"out.2.bias": torch.full((4,), torch.inf)}, "out.2.bias: holds NaN or infinite values"),
    "bits": ({"out.2.bias": torch.zeros(4, dtype=torch.uint8).view(torch.bits8)}, "out.2.bias: .*holds bits8, but"),
    "4 bits": ({"out.2.bias": torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, "out.2.bias: .*holds float4"),
    "8 bits": ({"out.2.bias": torch.full((4,), 7.0).to(torch.float8_e4m3fn)}, r"out.2.bias: \|\|a - b\|\|"),
}


@pytest.mark.parametrize("what", ODD)
def test_what_cannot_be_compared_is_named(ldm, tmp_path, what):
    more, words = ODD[what]
    lines = list(converting.compare(changed(ldm, tmp_path, **more), "toy"))
    assert lines[0].startswith("1 of 68")
    assert re.match(f"  {words}", lines[1])


def test_a_controlnet_with_a_unet_of_another_shape_is_remarked_on(toy, ldm, tmp_path):
    """A v1.0 file holds a U-Net of its own."""
    net = ControlNet.load("toy-canny")
    net.save(tmp_path / "net.safetensors")
    state = files.read(tmp_path / "net.safetensors") | {"model.diffusion_model.out.2.weight": torch.zeros(5, 5)}
    metadata = files.open_weights(tmp_path / "net.safetensors").metadata
    safetensors.torch.save_file(state, tmp_path / "v10.safetensors", metadata)
    with pytest.warns(UserWarning, match="holds a U-Net of its own: 686 of 1 tensors differ"):
        ControlNet.load(tmp_path / "v10.safetensors", unet=toy.unet)


@pytest.mark.parametrize("what", ["NaN", "infinite", "bits", "4 bits", "of another shape", "less"])
@pytest.mark.parametrize("base", ["new", "old"])
def test_nothing_odd_is_moved_into_a_controlnet(ldm, tmp_path, what, base):
    """The base is named, and nothing written."""
    [[name, tensor]] = ODD[what][0].items()
    name = {"out.2.weight": "time_embed.0.weight", "out.2.bias": "time_embed.0.bias"}[name]
    if tensor is not None and tensor.ndim == 1:
        tensor = torch.cat([tensor.view(torch.uint8)] * 32).view(tensor.dtype)
    path = changed(ldm, tmp_path, **{name: tensor})
    bases = {"transfer_to": path, "transfer_from": "toy"} if base == "new" else {"transfer_to": "toy", "transfer_from": path}
    with pytest.raises(ValueError, match=r"changed\.pth"):
        converting.convert("toy-canny", tmp_path / "moved.safetensors", "ldm", **bases)
    assert not (tmp_path / "moved.safetensors").exists()


def test_a_difference_is_added_to_what_fits(controlnet, unet, tmp_path):
    for name, tensor in (("time_embed.0.weight", torch.zeros(3, 3)), ("time_embed.9.weight", torch.zeros(8))):
        state = {"difference": torch.zeros(1), **controlnet.state_dict(), name: tensor}
        torch.save(state, tmp_path / "d.pth")
        with pytest.raises(ValueError, match=rf"d\.pth.*({name} has shape|1 are unexpected \({name}\))"):
            ControlNet.load(tmp_path / "d.pth", unet=unet)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e6])
def test_nan_and_infinity_are_not_written(tmp_path, number):
    """Neither those that are there nor those that a lower precision makes; what was there stays."""
    files.write(tmp_path / "x.safetensors", {"a": torch.ones(2), "count": torch.tensor(3)})
    with pytest.raises(
        ValueError, match=r"x\.safetensors is not written: in torch\.float16, b holds NaN or infinite values"
    ):
        files.write(tmp_path / "x.safetensors", {"a": torch.ones(2), "b": torch.full((2,), number).half()})
    assert files.read(tmp_path / "x.safetensors")["a"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_written_whole_or_not_at_all(toy, tmp_path, there):
    """Here the autoencoder cannot be written, after the U-Net; an empty folder may be there."""
    sd = StableDiffusion(toy.unet, copy.deepcopy(toy.vae), toy.text_encoder, toy.tokenizer)
    with torch.no_grad():
        sd.vae.quant_conv.bias.fill_(1e6)
    if there:
        (tmp_path / "m").mkdir()
    with pytest.raises(ValueError, match=r"model\.safetensors is not written: in torch\.float16, quant_conv\.bias holds"):
        sd.save(tmp_path / "m", dtype=torch.float16)
    assert [*tmp_path.rglob("*")] == [tmp_path / "m"] * there
    sd.save(tmp_path / "m")
    assert (tmp_path / "m" / "model_index.json").is_file()


def test_an_annotators_file_of_other_numbers_is_named(tmp_path):
    """Quantised numbers, bits and whole numbers are no weights."""
    hed = {key: tensor.float() for key, tensor in networks.HED().state_dict().items()}
    odd = {
        "bits": torch.zeros(1, 3, 1, 1, dtype=torch.uint8).view(torch.bits8),
        "whole": torch.zeros(1, 3, 1, 1, dtype=torch.int32),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd["quantised"] = torch.quantize_per_tensor(torch.zeros(1, 3, 1, 1), 0.1, 0, torch.qint8)
    for name, tensor in odd.items():
        torch.save(
            {**{key: torch.zeros(1).expand(t.shape) for key, t in hed.items()}, "norm": tensor}, tmp_path / f"{name}.pth"
        )
        with pytest.raises(ValueError, match=rf"{name}\.pth"):
            networks.HED.load(tmp_path / f"{name}.pth")
