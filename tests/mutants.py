"""Planted bugs: small edits of the source, each with the test that must then fail.

python tests/mutants.py                  all of them, some minutes on one core
python tests/mutants.py --dozen          a fixed dozen, as .ci/run does
python tests/mutants.py --only PATTERN   those whose file, words, or test match a regular expression
python tests/mutants.py --list           name them, run nothing

First the named tests run on an unchanged copy of the package. Then each edit is made in that copy, its test
runs in a process of its own, which had PyTorch imported already, and the edit is taken back. A mutant is

    caught     its test fails
    survived   its test passes: the test is too weak
    broken     the edit no longer applies (its old text must occur exactly once in the file), the test is gone, cannot be
               collected, fails without the edit, too, or took longer than five minutes

The exit status is 1 if any survives or is broken. Every edit is checked for applying, also those that are not run.
"""

import argparse
import contextlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # longer than any test here takes
PRELOADED = (
    "torch torch.distributed torch.utils.checkpoint safetensors.torch numpy PIL.Image PIL.ImageOps regex ftfy tqdm pytest "
    "_pytest.faulthandler _pytest.junitxml _pytest.skipping _pytest.threadexception _pytest.tracemalloc _pytest.unittest "
    "_pytest.unraisableexception _pytest.warnings"
).split()
OPTIONS = "-q --tb=short -p no:cacheprovider -o addopts=".split()


class Mutant(NamedTuple):
    file: str
    words: str  # what is wrong
    old: str  # must occur exactly once in the file
    new: str
    test: str  # name of the function that must fail, in whichever file it is; with [case], that case alone

    def __str__(self) -> str:
        return f"{self.file}: {self.words} ({self.test})"


# One copy of the package, an edit at a time


def copy_of_the_package(folder: Path) -> None:
    """Copy code, tests and settings; weights and other data become links."""

    def copy(source: str, destination: str) -> None:
        if source.endswith(".py"):
            shutil.copy2(source, destination)
        else:
            os.symlink(source, destination)

    for name in ("minicn", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, copy_function=copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy2(file, folder)


@contextlib.contextmanager
def planted(mutant: Mutant, folder: Path):
    """Inside `with`, the copy has the bug."""
    file = folder / mutant.file
    whole, before = file.read_text("utf-8"), file.stat()
    file.write_text(whole.replace(mutant.old, mutant.new), "utf-8")
    os.utime(file, (before.st_atime, before.st_mtime + 10))  # or bytecode of the same size and second would be used
    try:
        yield
    finally:
        file.write_text(whole, "utf-8")
        os.utime(file, (before.st_atime, before.st_mtime))


def fault(mutant: Mutant, root: Path = ROOT) -> str:
    """Return why an edit does not apply; "" if it does."""
    file = root / mutant.file
    if not file.is_file():
        return f"there is no {mutant.file}"
    whole = file.read_text("utf-8")
    if whole.count(mutant.old) != 1:
        return f"the old text occurs {whole.count(mutant.old)} times, not once"
    try:
        compile(whole.replace(mutant.old, mutant.new), mutant.file, "exec")
    except SyntaxError as error:
        return f"the new text is no Python: {error}"
    return "" if nodes(mutant.test, root) else "there is no such test"


def nodes(test: str, root: Path = ROOT) -> list[str]:
    """Return what pytest calls a test function, in every file that defines one of this name."""
    name = re.compile(rf"^def {test.partition('[')[0]}\(", re.MULTILINE)
    files = sorted(file for file in (root / "tests").rglob("test_*.py") if name.search(file.read_text("utf-8")))
    return [f"{file.relative_to(root)}::{test}" for file in files]


# The tests, in processes that begin with PyTorch imported


def pytest_there(folder: Path, arguments: list[str], planted: bool) -> None:
    """Run pytest in the copy and exit with its status; what it prints goes to a file."""
    with open(folder / "output.txt", "w") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ.update(PYTHONPATH=str(folder), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")  # Jupyter's plugins take two seconds
    sys.dont_write_bytecode = planted
    import pytest

    status = pytest.main([*arguments, *OPTIONS, "--basetemp", str(folder / "tmp")])
    used = Path(sys.modules["minicn"].__file__) if "minicn" in sys.modules else None
    if used is not None and folder not in used.parents:
        print(f"{used} was imported, not the copy")
        status = 3
    sys.stdout.flush()
    sys.exit(int(status))


def status_of(folder: Path, arguments: list[str], planted: bool = True) -> int | None:
    """Return pytest's exit status: 0 passed, 1 failed, else it could not run; None if it took too long."""
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=pytest_there, args=(folder, arguments, planted))
    process.start()
    process.join(SECONDS if planted else None)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def failing(folder: Path, tests: list[str]) -> set[str]:
    """Return those of some tests that fail without a planted bug, as file::function."""
    if status_of(folder, tests, planted=False) == 0:
        return set()
    output = (folder / "output.txt").read_text("utf-8", "replace")
    found = set(re.findall(r"^(?:FAILED|ERROR) ([^\s\[]+::\w+)", output, re.MULTILINE))
    if not found:
        sys.exit(f"{output}\nThe tests do not run without a planted bug.")
    return found


def outcome(mutant: Mutant, folder: Path, failing: set[str]) -> tuple[str, str]:
    """Return caught, survived or broken, and why it is broken."""
    why = fault(mutant, folder)
    if why:
        return "broken", why
    if any(node.partition("[")[0] in failing for node in nodes(mutant.test, folder)):
        return "broken", "the test fails without it, too"
    with planted(mutant, folder):
        status = status_of(folder, ["-x", *nodes(mutant.test, folder)])
    if status is None:
        return "broken", f"the test took longer than {SECONDS} s"
    if status in (0, 1):
        return ("survived", "") if status == 0 else ("caught", "")
    lines = (folder / "output.txt").read_text("utf-8", "replace").strip().splitlines()
    return "broken", f"the test could not run: {' / '.join(lines[-4:])}"


def chosen(args: argparse.Namespace) -> list[Mutant]:
    """Return the mutants that the arguments ask for."""
    if args.dozen:
        return [m for m in MUTANTS if m.words in DOZEN]
    return [m for m in MUTANTS if re.search(args.only, str(m))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="those whose file, words or test match it")
    parser.add_argument("--dozen", action="store_true", help="a fixed dozen")
    parser.add_argument("--list", action="store_true", help="name them, run nothing")
    args = parser.parse_args(argv)
    mutants, start = chosen(args), time.time()
    if not mutants:
        parser.error(f"no mutant matches {args.only!r}: --list names them")
    if args.list:
        print("\n".join(map(str, mutants)))
        return 0
    counts = {"caught": 0, "survived": 0, "broken": 0}
    for mutant in MUTANTS:
        why = "" if mutant in mutants else fault(mutant)
        if why:
            counts["broken"] += 1
            print(f"broken    {mutant}: {why}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are tiny
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_of_the_package(folder)
        tests = sorted({node for mutant in mutants for node in nodes(mutant.test)})
        print(f"{len(tests)} tests without a planted bug ...", flush=True)
        red = failing(folder, tests) if tests else set()
        for mutant in (bar := tqdm(mutants, unit="mutant")):
            bar.set_postfix_str(mutant.words[:40])
            result, why = outcome(mutant, folder, red)
            counts[result] += 1
            if result != "caught":
                bar.write(f"{result:9} {mutant}{': ' if why else ''}{why}")
    minutes = (time.time() - start) / 60
    print(f"{', '.join(f'{count} {result}' for result, count in counts.items())}; {minutes:.1f} minutes")
    return 0 if counts["caught"] == sum(counts.values()) else 1


# The bugs: file, then (what is wrong, old text, new text, the test that must fail)

BUGS = {
    "minicn/toy/judging.py": [
        (
            "the judge does not mind the background",
            "return background == scene.background and found ==",
            "return found ==",
            "test_each_picture_is_right_for_its_own_caption_alone",
        ),
        (
            "half a thing is a thing",
            "found = self(seen).argmax(1)",
            "found = self(seen)[:, :-1].argmax(1)",
            "test_spoiled_scenes_are_wrong",
        ),
        (
            "a thing counts, whatever its colour",
            "append(found.get(thing.colour) == thing.kind)",
            "append(thing.kind in found.values())",
            "test_accuracy_counts_by_number_and_by_kind",
        ),
    ],
    "minicn/unet.py": [
        (
            "zero layers start as small random values",
            "        nn.init.zeros_(p)",
            "        nn.init.normal_(p, std=1e-3)",
            "test_eq5_a_fresh_zero_convolution_gives_zero",
        ),
        (
            "zero layers keep a random bias",
            "    for p in module.parameters():\n        nn.init.zeros_(p)",
            "    nn.init.zeros_(module.weight)",
            "test_eq4_fresh_controlnet_changes_nothing",
        ),
        (
            "wavelengths are a thousandth off",
            "math.log(10000)",
            "math.log(10010)",
            "test_timestep_embedding_is_cosines_then_sines",
        ),
        (
            "sines come before cosines",
            "torch.cat([angles.cos(), angles.sin()], dim=-1)",
            "torch.cat([angles.sin(), angles.cos()], dim=-1)",
            "test_timestep_embedding_is_cosines_then_sines",
        ),
        (
            "a resnet block has no shortcut",
            "return self.skip_connection(x) + self.out_layers(h)",
            "return self.out_layers(h)",
            "test_a_resnet_block_is_two_convolutions_with_the_time_in_between",
        ),
        (
            "a resnet block does not know the time",
            "self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]",
            "self.in_layers(x)",
            "test_every_residual_depends_on_every_input",
        ),
        (
            "time is multiplied, not added",
            "self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]",
            "self.in_layers(x) * self.emb_layers(emb)[:, :, None, None]",
            "test_a_resnet_block_is_two_convolutions_with_the_time_in_between",
        ),
        (
            "queries have a bias",
            "self.to_q = nn.Linear(dim, dim, bias=False)",
            "self.to_q = nn.Linear(dim, dim)",
            "test_full_size_models_have_the_published_number_of_parameters",
        ),
        (
            "every heads-th channel forms a head",
            "x.unflatten(-1, (self.heads, -1)).transpose(1, 2)",
            "x.unflatten(-1, (-1, self.heads)).permute(0, 3, 1, 2)",
            "test_attention_of_the_unet_is_the_softmax_of_its_scores",
        ),
        (
            "GEGLU's halves are swapped",
            "value, gate = self.proj(x)",
            "gate, value = self.proj(x)",
            "test_the_feed_forward_is_gated_by_the_exact_gelu",
        ),
        (
            "GELU is approximated by tanh",
            "F.gelu(gate)",
            'F.gelu(gate, approximate="tanh")',
            "test_the_feed_forward_is_gated_by_the_exact_gelu",
        ),
        (
            "attention to the text has no residual",
            "x = x + self.attn2(self.norm2(x), context)",
            "x = self.attn2(self.norm2(x), context)",
            "test_a_transformer_block_is_three_residuals",
        ),
        (
            "the feed-forward takes the second norm",
            "self.ff(self.norm3(x))",
            "self.ff(self.norm2(x))",
            "test_a_transformer_block_is_three_residuals",
        ),
        (
            "the transformer's norm has eps 1e-5",
            "eps=1e-6)",
            "eps=1e-5)",
            "test_a_spatial_transformer_is_a_residual_over_all_positions",
        ),
        (
            "the transformer has no residual",
            "return x + self.proj_out(h)",
            "return self.proj_out(h)",
            "test_a_spatial_transformer_is_a_residual_over_all_positions",
        ),
        (
            "downsampling takes the odd pixels",
            "return self.op(x)",
            "return self.op(x.roll(-1, 3))",
            "test_upsampling_repeats_pixels_and_downsampling_takes_every_second",
        ),
        (
            "upsampling always doubles (as ldm does)",
            'F.interpolate(x, size=size, mode="nearest")',
            'F.interpolate(x, scale_factor=2.0, mode="nearest")',
            "test_latents_of_any_size",
        ),
        (
            "upsampling is bilinear",
            'F.interpolate(x, size=size, mode="nearest")',
            'F.interpolate(x, size=size, mode="bilinear")',
            "test_upsampling_repeats_pixels_and_downsampling_takes_every_second",
        ),
        (
            "the last level has attention, too",
            "            if level < len(widths) - 1:\n                layers.append",
            "            if level < len(widths):\n                layers.append",
            "test_full_size_models_have_the_published_names_and_shapes",
        ),
        (
            "a decoder block takes its skip first",
            "torch.cat([h, skips.pop()], dim=1)",
            "torch.cat([skips.pop(), h], dim=1)",
            "test_a_decoder_block_takes_what_came_and_then_its_skip",
        ),
        (
            "residuals 1 and 2 are swapped",
            "zip([*skips, h], control, strict=True))\n",
            "zip([*skips, h], [control[0], control[2], control[1], *control[3:]], strict=True))\n",
            "test_control_i_enters_at_its_own_block",
        ),
        (
            "the middle residual is dropped",
            "zip([*skips, h], control, strict=True))\n",
            "zip([*skips, h], [*control[:-1], None], strict=True))\n",
            "test_control_i_enters_at_its_own_block",
        ),
        (
            "residuals multiply",
            "f if c is None else f + c",
            "f if c is None else f * c",
            "test_control_is_added_linearly_to_the_features",
        ),
        (
            "a constant is added with the control",
            "f if c is None else f + c",
            "f if c is None else f + c + 1e-3",
            "test_scale_zero_is_no_control",
        ),
        (
            "the caller's list is emptied (as the official code does)",
            "zip([*skips, h], control, strict=True))\n",
            "zip([*skips, h], [control.pop(0) for _ in range(13)], strict=True))\n",
            "test_control_is_not_changed_by_the_call",
        ),
        (
            "residuals are changed in place",
            "f if c is None else f + c",
            "f if c is None else c.add_(f)",
            "test_control_is_not_changed_by_the_call",
        ),
        (
            "the size of residuals is not checked",
            "fits = residual.shape[2:] in (feature.shape[2:], (1, 1))",
            "fits = True",
            "test_control_that_does_not_fit_is_refused_in_words",
        ),
        (
            "the number of residuals is not checked",
            "if len(control) != len(features):",
            "if len(control) < 0:",
            "test_control_that_does_not_fit_is_refused_in_words",
        ),
        (
            "timesteps are not checked",
            "if timesteps.shape != x.shape[:1]:",
            "if timesteps.ndim > 9:",
            "test_inputs_that_do_not_fit_are_refused_in_words",
        ),
        (
            "16 groups by default",
            "norm_num_groups: int = 32",
            "norm_num_groups: int = 16",
            "test_default_sizes_that_no_weight_shows",
        ),
    ],
    "minicn/controlnet.py": [
        (
            "zero_conv is 3x3 by default",
            "c_out: int | None = None, kernel_size: int = 1)",
            "c_out: int | None = None, kernel_size: int = 3)",
            "test_eq5_is_the_bias_plus_the_weighted_sum_of_the_channels",
        ),
        (
            "zero_linear has no bias",
            "zero_module(nn.Linear(dim_in, dim_out or dim_in))",
            "zero_module(nn.Linear(dim_in, dim_out or dim_in, bias=False))",
            "test_eq5_is_the_bias_plus_the_weighted_sum_of_the_channels",
        ),
        (
            "the 3x3 zero convolution is not padded",
            "padding=kernel_size // 2",
            "padding=0",
            "test_eq6_holds_for_the_3x3_zero_convolution",
        ),
        (
            "the condition is dropped",
            "self.copy(x + self.zero_in(c), *args)",
            "self.copy(x, *args)",
            "test_eq2_is_the_block_plus_its_copy_between_zero_convolutions",
        ),
        (
            "Z(x + c) instead of x + Z(c)",
            "self.copy(x + self.zero_in(c), *args)",
            "self.copy(self.zero_in(x + c), *args)",
            "test_eq3_fresh_copy_sees_the_same_input_and_its_output_is_blocked",
        ),
        (
            "y_c is y times 1.0001",
            "return y + self.zero_out(",
            "return 1.0001 * y + self.zero_out(",
            "test_eq4_fresh_controlled_block_changes_nothing",
        ),
        (
            "train() also sets the locked block to training",
            "self.locked.eval()  # a locked",
            "pass  # a locked",
            "test_the_locked_batch_norm_does_not_count",
        ),
        (
            "the copy is the block itself",
            "copy.deepcopy(block).requires_grad_(True)",
            "block.requires_grad_(True)",
            "test_the_copy_shares_no_memory_with_the_locked_block",
        ),
        (
            "the locked block takes gradients",
            "block.requires_grad_(False).eval()",
            "block.eval()",
            "test_the_locked_block_never_changes",
        ),
        (
            "no gradient behind the outer zero convolution",
            "self.copy(x + self.zero_in(c), *args))",
            "self.copy(x + self.zero_in(c), *args).detach())",
            "test_eq7_and_eq8_one_step_opens_the_way_to_the_copy",
        ),
        (
            "from_unet forgets the middle block",
            '("time_embed", "input_blocks", "middle_block"):\n            #',
            '("time_embed", "input_blocks"):\n            #',
            "test_eq3_fresh_controlnet_computes_the_unets_own_features",
        ),
        (
            "ControlNet ignores the hint",
            "h = h + hint_features",
            "h = h + 0 * hint_features",
            "test_eq5_control_is_the_zero_convolutions_of_the_features",
        ),
        (
            "the hint comes in before the zero convolution of block 0 alone",
            "            control.append(None if self.only_middle else zero(h))\n",
            "            control.append(None if self.only_middle else zero(h))\n"
            "            h = h - hint_features * (i == 0)\n",
            "test_eq9_the_features_join_the_latents_after_their_first_convolution",
        ),
        (
            "no gradient behind the 11 zero convolutions",
            "None if self.only_middle else zero(h))",
            "None if self.only_middle else zero(h.detach()))",
            "test_eq7_and_eq8_one_step_opens_all_thirteen_connections",
        ),
        (
            "no gradient reaches the middle residual",
            "self.middle_block_out(self.middle_block(h, emb, context))",
            "self.middle_block_out(self.middle_block(h, emb, context).detach())",
            "test_eq7_and_eq8_one_step_opens_all_thirteen_connections",
        ),
        (
            "ControlNet shares the U-Net's memory",
            "copy.deepcopy(getattr(unet, part)).requires_grad_(True)",
            "getattr(unet, part).requires_grad_(True)",
            "test_training_changes_the_controlnet_alone",
        ),
        (
            "the copy is always float32",
            "return net.to(like.device, like.dtype)",
            "return net.to(like.device, torch.float32)",
            "test_from_unet_takes_the_unets_dtype",
        ),
        (
            "the hint encoder's last convolution is not zero",
            "zero_conv(channels[-1], c_out, kernel_size=3))",
            "nn.Conv2d(channels[-1], c_out, 3, padding=1))",
            "test_gradient_wakes_the_controlnet_from_the_outside_in",
        ),
        (
            "two zero convolutions in a row",
            "nn.Sequential(zero_conv(c)) for c in skip_channels",
            "nn.Sequential(zero_conv(c), zero_conv(c)) for c in skip_channels",
            "test_gradient_wakes_the_controlnet_from_the_outside_in",
        ),
        (
            "all samples get the first hint",
            "self.input_hint_block(hint.flip(1) if self.cfg.bgr else hint)",
            "self.input_hint_block(hint[:1].flip(1) if self.cfg.bgr else hint[:1])",
            "test_samples_of_a_batch_do_not_meet",
        ),
        (
            "forward doubles the hint's features",
            "self.residuals(x, self.hint_features(hint), timesteps, context)",
            "self.residuals(x, 2 * self.hint_features(hint), timesteps, context)",
            "test_residuals_from_the_hints_features_are_those_of_forward",
        ),
        (
            "the copy's encoder gets no text",
            "            h = block(h, emb, context)\n",
            "            h = block(h, emb, 0 * context)\n",
            "test_every_residual_depends_on_every_input",
        ),
        (
            "the paper's hint encoder has 3x3 kernels",
            "nn.Conv2d(width, c, 4, stride=2, padding=1)",
            "nn.Conv2d(width, c, 3, stride=2, padding=1)",
            "test_hint_encoder_of_the_paper_has_4x4_convolutions_of_stride_2",
        ),
        (
            "ReLU after the hint encoder's strides",
            "wider, 3, stride=2, padding=1), nn.SiLU()]",
            "wider, 3, stride=2, padding=1), nn.ReLU()]",
            "test_hint_encoder_has_the_released_layout",
        ),
        (
            "the hint encoder does not shrink",
            "nn.Conv2d(c, wider, 3, stride=2, padding=1)",
            "nn.Conv2d(c, wider, 3, stride=1, padding=1)",
            "test_hint_encoder_divides_the_size_by_eight",
        ),
        (
            "the hint encoder keeps PyTorch's first weights",
            "nn.init.kaiming_normal_(layer.weight)",
            "pass",
            "test_a_hint_arrives_at_the_end_of_the_hint_encoder",
        ),
        (
            "from_unet ignores paper_hint_encoder",
            "ControlNetConfig(unet.cfg, hint_channels, paper_hint_encoder)",
            "ControlNetConfig(unet.cfg, hint_channels)",
            "test_eq4_holds_with_the_hint_encoder_of_the_paper",
        ),
        (
            "a hint of 57 pixels passes for 64",
            "if hint.shape[-2:] != (height, width):",
            "if (-(-hint.shape[-2] // 8), -(-hint.shape[-1] // 8)) != tuple(latents.shape[-2:]):",
            "test_hints_that_do_not_fit_are_refused_in_words",
        ),
        (
            "other default widths of the hint encoder",
            "hint_channels: tuple[int, ...] = (16, 32, 96, 256)  # widths",
            "hint_channels: tuple[int, ...] = (16, 32, 64, 256)  # widths",
            "test_config_defaults_are_the_published_ones",
        ),
        (
            "the twelve others stay connected",
            "None if self.only_middle else zero(h))",
            "zero(h))",
            "test_middle_alone_is_the_middle_residual_of_all",
        ),
        (
            "shuffle is not averaged",
            "c.mean((2, 3), keepdim=True)",
            "c",
            "test_shuffle_and_bgr_are_read_from_name_and_configuration",
        ),
        (
            "bgr is ignored",
            "hint.flip(1) if self.cfg.bgr else hint",
            "hint",
            "test_shuffle_and_bgr_are_read_from_name_and_configuration",
        ),
    ],
    "minicn/vae.py": [
        (
            "the autoencoder norms with 1e-5",
            "eps=1e-6)",
            "eps=1e-5)",
            "test_a_resnet_block_of_the_autoencoder_is_two_convolutions",
        ),
        (
            "3x3 shortcuts in the autoencoder",
            "self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)",
            "self.nin_shortcut = nn.Conv2d(c_in, c_out, 3, padding=1)",
            "test_full_size_models_have_the_published_number_of_parameters",
        ),
        (
            "the second activation is left out",
            "self.conv2(F.silu(self.norm2(h)))",
            "self.conv2(self.norm2(h))",
            "test_a_resnet_block_of_the_autoencoder_is_two_convolutions",
        ),
        (
            "the autoencoder's attention has no residual",
            "return x + self.proj_out(h.reshape(x.shape))",
            "return self.proj_out(h.reshape(x.shape))",
            "test_attention_of_the_autoencoder_is_one_head_over_all_positions",
        ),
        (
            "the autoencoder's attention transposes the map",
            "[:, 0].transpose(1, 2)  # (B, C, H*W)",
            "[:, 0]  # (B, C, H*W)",
            "test_attention_of_the_autoencoder_is_one_head_over_all_positions",
        ),
        (
            "the autoencoder pads left and above",
            "F.pad(x, (0, 1, 0, 1))",
            "F.pad(x, (1, 0, 1, 0))",
            "test_the_autoencoder_pads_right_and_below",
        ),
        (
            "the autoencoder enlarges bilinearly",
            'F.interpolate(x, scale_factor=2.0, mode="nearest")',
            'F.interpolate(x, scale_factor=2.0, mode="bilinear")',
            "test_the_autoencoder_enlarges_by_repeating_pixels",
        ),
        (
            "decoder levels are stored in the order they run",
            "pairs = zip((*widths[1:], widths[-1]), widths, strict=True)\n",
            "pairs = [*zip((*widths[1:], widths[-1]), widths, strict=True)][::-1]\n",
            "test_full_size_models_have_the_published_names_and_shapes",
        ),
        (
            "the decoder leaves out its finest level",
            "for level in reversed(self.up):",
            "for level in reversed(self.up[1:]):",
            "test_the_decoder_is_blocks_and_a_last_norm",
        ),
        (
            "the encoder skips its attention",
            "self.block_2(self.attn_1(self.block_1(x)))",
            "self.block_2(self.block_1(x))",
            "test_the_encoder_is_blocks_and_a_last_norm",
        ),
        (
            "std is the variance",
            "(0.5 * logvar.clamp(-30.0, 20.0)).exp()",
            "logvar.clamp(-30.0, 20.0).exp()",
            "test_encode_gives_mean_and_standard_deviation",
        ),
        (
            "the log-variance is not held",
            "logvar.clamp(-30.0, 20.0)",
            "logvar",
            "test_encode_gives_mean_and_standard_deviation",
        ),
        (
            "the moments come in the other order",
            "mean, logvar = self.quant_conv",
            "logvar, mean = self.quant_conv",
            "test_encode_gives_mean_and_standard_deviation",
        ),
        (
            "quant_conv is left out",
            "self.quant_conv(self.encoder(images)).chunk",
            "self.encoder(images).chunk",
            "test_encode_gives_mean_and_standard_deviation",
        ),
        (
            "post_quant_conv is left out",
            "self.decoder(self.post_quant_conv(latents))",
            "self.decoder(latents)",
            "test_the_decoder_is_blocks_and_a_last_norm",
        ),
        (
            "the scale is that of SDXL",
            "scaling_factor: float = 0.18215",
            "scaling_factor: float = 0.13025",
            "test_default_sizes_that_no_weight_shows",
        ),
    ],
    "minicn/clip.py": [
        (
            "11 text layers",
            "num_layers: int = 12",
            "num_layers: int = 11",
            "test_full_size_models_have_the_published_number_of_parameters",
        ),
        (
            "8 heads in the text transformer",
            "num_heads: int = 12",
            "num_heads: int = 8",
            "test_default_sizes_that_no_weight_shows",
        ),
        ("CLIP has the exact GELU", "h * torch.sigmoid(1.702 * h)", "F.gelu(h)", "test_the_text_transformer_is_its_formula"),
        (
            "quick GELU is rounded",
            "torch.sigmoid(1.702 * h)",
            "torch.sigmoid(1.7 * h)",
            "test_the_text_transformer_is_its_formula",
        ),
        (
            "words see those after them",
            "is_causal=True",
            "is_causal=False",
            "test_a_word_does_not_change_the_features_before_it",
        ),
        (
            "positions are left out",
            " + self.position_embedding.weight[: tokens.shape[1]]",
            "",
            "test_the_text_transformer_is_its_formula",
        ),
        ("no last LayerNorm", "return self.final_layer_norm(h)", "return h", "test_the_text_transformer_is_its_formula"),
        (
            "the text transformer's MLP has no residual",
            "return x + self.mlp(self.layer_norm2(x))",
            "return self.mlp(self.layer_norm2(x))",
            "test_the_text_transformer_is_its_formula",
        ),
        ("tokens of any type pass", " or tokens.dtype != torch.int64:", ":", "test_tokens_that_do_not_fit_are_refused"),
    ],
    "minicn/tokenizer.py": [
        (
            "entities within entities are resolved one by one",
            'ftfy.fix_text(NESTED.sub("&" + 8 * "amp;", text))',
            "ftfy.fix_text(text)",
            "test_entities_within_entities_cost_their_length",
        ),
        ("a gz has no end", "or len(text) > GZ_BYTES:", "or not text:", "test_a_gz_is_not_unpacked_without_end"),
        ("ids are not checked", "type(i) is not int or not 0 <= i < 2**20", "False", "test_damaged_files_are_named"),
        ("long words are kept", "if len(letters) < 100 else", "if letters else", "test_a_long_word_costs_its_length"),
        ("the table of letters leaves out ~", 'ord("~") + 1', 'ord("~")', "test_byte_letters_is_the_table_of_gpt2"),
        ("byte AD counts as printable", 'range(ord("®")', "range(0xAD", "test_byte_letters_is_the_table_of_gpt2"),
        (
            "ends of words before bytes",
            '[*letters, *(letter + "</w>" for letter in letters), *',
            '[*(letter + "</w>" for letter in letters), *letters, *',
            "test_vocabulary_is_bytes_then_ends_then_merges_then_specials",
        ),
        (
            "words have no end",
            'parts = [*letters[:-1], letters[-1] + "</w>"]',
            "parts = [*letters]",
            "test_merges_are_applied_earliest_learned_first",
        ),
        (
            "the first known pair is merged, not the earliest learned",
            "rank, merged = heapq.heappop(ranks), []",
            "rank, merged = ranks.pop(), []",
            "test_rank_decides_and_not_the_place_in_the_word",
        ),
        (
            "entities are resolved once",
            "for _ in range(2):",
            "for _ in range(1):",
            "test_words_of_a_prompt",
        ),
        ("digits stay together", "[\\p{N}]|[^", "[\\p{N}]+|[^", "test_words_of_a_prompt"),
        ("no lower case", ".strip().lower()", ".strip()", "test_words_of_a_prompt"),
        (
            "letters as latin-1",
            'word.encode("utf-8"))',
            'word.encode("latin-1", "replace"))',
            "test_letters_beyond_ascii_are_their_utf8_bytes",
        ),
        (
            "decode joins words",
            '.replace("</w>", " ")',
            '.replace("</w>", "")',
            "test_any_script_survives_encode_and_decode",
        ),
        (
            "specials are split like words",
            "for part in SPECIAL.split(clean(text)):",
            "for part in [clean(text)]:",
            "test_special_tokens_written_in_a_prompt_are_one_token",
        ),
        (
            "padding with 0 (as SD 2)",
            "ids + [self.end] * (self.max_length - len(ids))",
            "ids + [0] * (self.max_length - len(ids))",
            "test_prompts_become_rows_of_77",
        ),
        (
            "the end is cut off",
            "[self.start, *self.encode(prompt)[: self.max_length - 2], self.end]",
            "[self.start, *self.encode(prompt), self.end][: self.max_length]",
            "test_long_prompts_are_cut_and_keep_the_end",
        ),
        (
            "the version line is read as a merge",
            'text.split("\\n")[1:]',
            'text.split("\\n")',
            "test_the_gz_of_openai_is_a_version_line_and_merges",
        ),
        ("all lines of the gz count", "[: 49408 - 512 - 2]", "", "test_the_gz_goes_on_beyond_what_clip_uses"),
        ("a file cut off is a bare EOFError", "(OSError, EOFError, ", "(OSError, ", "test_a_file_that_is_no_gz_is_refused"),
        (
            "lines of merges are not checked",
            "len(row) == 2 and",
            "",
            "test_lines_that_are_no_pairs_are_refused",
        ),
        (
            "the vocabulary is not checked",
            "if not isinstance(vocab, dict) or START not in vocab or END not in vocab:",
            "if vocab is None:",
            "test_a_vocabulary_of_something_else_is_refused",
        ),
        (
            "prompts are not checked",
            "if isinstance(prompts, str) or not all(",
            "if prompts is None or not all(",
            "test_what_is_no_list_of_texts_is_refused",
        ),
        (
            "two lost tokens are not named",
            "self.encode(prompt)[self.max_length - 2 :]",
            "self.encode(prompt)[self.max_length :]",
            "test_words_that_are_lost_are_named",
        ),
    ],
    "minicn/ddim.py": [
        (
            "beta ends at 0.0121",
            "0.012**0.5, NUM",
            "0.0121**0.5, NUM",
            "test_alphas_cumprod_is_the_product_of_one_minus_beta",
        ),
        (
            "beta grows linearly",
            "torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float64) ** 2",
            "torch.linspace(0.00085, 0.012, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)",
            "test_alphas_cumprod_of_stable_diffusion",
        ),
        (
            "1000 steps begin at 1000",
            "last = 1 if num_steps < NUM_TRAIN_TIMESTEPS else 0",
            "last = 1",
            "test_timesteps_of_every_number_of_steps",
        ),
        (
            "ldm's list: 31 steps for 30",
            "for i in reversed(range(num_steps))]",
            "for i in reversed(range(-(-NUM_TRAIN_TIMESTEPS // (NUM_TRAIN_TIMESTEPS // num_steps))))]",
            "test_timesteps_of_twenty_and_of_thirty",
        ),
        ("0 steps are taken", "if not 1 <= num_steps", "if not 0 <= num_steps", "test_timesteps_out_of_range_are_refused"),
        (
            "no roots in the forward process",
            "return abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * eps",
            "return abar_t * x_0 + (1 - abar_t) * eps",
            "test_forward_process_eq4_of_ddpm",
        ),
        (
            "a sample's abar is spread along the wrong axis",
            "abar_t.reshape(-1, *[1] * (x_0.ndim - 1))",
            "abar_t.reshape(-1, 1)",
            "test_forward_process_takes_one_step_a_sample",
        ),
        (
            "guidance starts from the conditional prediction",
            "return eps_uncond + guidance_scale",
            "return eps_cond + guidance_scale",
            "test_guidance_of_zero_is_unconditional_and_of_one_conditional",
        ),
        (
            "wrong sign in guidance",
            "(eps_cond - eps_uncond)",
            "(eps_uncond - eps_cond)",
            "test_guidance_of_zero_is_unconditional_and_of_one_conditional",
        ),
        (
            "x_0 divided by abar, not its root",
            "* eps) / abar_t.sqrt()",
            "* eps) / abar_t",
            "test_a_step_with_the_true_noise_lands_on_the_forward_process",
        ),
        (
            "the step stays where it is",
            "return abar_s.sqrt() * x_0 + (1 - abar_s).sqrt() * eps",
            "return abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * eps",
            "test_a_step_with_the_true_noise_lands_on_the_forward_process",
        ),
        (
            "eps keeps its old share",
            "x_0 + (1 - abar_s).sqrt() * eps",
            "x_0 + (1 - abar_t).sqrt() * eps",
            "test_a_step_to_no_noise_returns_the_clean_latents",
        ),
        (
            "sigma without abar_s in the last factor",
            "(1 - abar_t / abar_s)",
            "(1 - abar_t)",
            "test_eta_1_is_the_posterior_of_ddpm",
        ),
        ("eps is not reduced by sigma", "(1 - abar_s - sigma**2)", "(1 - abar_s)", "test_the_variance_is_preserved"),
        (
            "sigma grows with the square of eta",
            "sigma = eta * (",
            "sigma = eta**2 * (",
            "test_sigma_grows_linearly_with_eta",
        ),
        (
            "the next step is one too far",
            "max(t - NUM_TRAIN_TIMESTEPS // num_steps, 0)",
            "max(t - 2 * (NUM_TRAIN_TIMESTEPS // num_steps), 0)",
            "test_generate_is_guidance_and_ddim_by_hand",
        ),
        ("eta is ignored", "num_steps)], eta, noise)", "num_steps)], 0, noise)", "test_eta_adds_noise_that_the_seed_fixes"),
    ],
    "minicn/inputs.py": [
        (
            "another size than the model's is silent",
            "if not 2 / 3 <= height * width / default**2 <= 3 / 2:",
            "if False:",
            "test_any_multiple_of_eight_is_drawn",
        ),
        (
            "unknown words are silent",
            "if known and strange:",
            "if False:",
            "test_words_that_a_model_of_few_words_does_not_know_are_named",
        ),
        (
            "transparent hints are silent",
            "        if opacity(hint) is not None:\n",
            "        if False:\n",
            "test_a_transparent_hint_is_white_as_in_the_official_apps_and_says_so",
        ),
        (
            "hints of one colour are silent",
            "        if torch.equal(h.amin((2, 3)), h.amax((2, 3))):\n",
            "        if False:\n",
            "test_a_hint_of_a_single_colour_says_so",
        ),
        (
            "the ranges of settings are not checked",
            "    if not (low <= value <= high and math.isfinite(value)):",
            "    if value is None:",
            "test_settings_out_of_range_are_named",
        ),
        (
            "a hint without a ControlNet passes",
            "if bool(nets) != bool(hints):",
            "if nets and not hints:",
            "test_settings_out_of_range_are_named",
        ),
        (
            "only multiples of 16",
            "        or height % 8\n",
            "        or height % 16\n",
            "test_any_multiple_of_eight_is_drawn",
        ),
    ],
    "minicn/pipeline.py": [
        (
            "the guidance scale is 9 for every model",
            "guidance_scale = self.defaults.guidance_scale",
            "guidance_scale = 9.0",
            "test_the_guidance_scale_is_the_models_own",
        ),
        (
            "a transparent mask is white",
            'to_rgb(mask, "black")',
            "to_rgb(mask)",
            "test_a_mask_is_black_where_it_is_transparent",
        ),
        (
            "a mask that selects nothing is silent",
            "if anew.all() or not anew.any():",
            "if False:",
            "test_a_mask_that_selects_nothing_or_all_says_so",
        ),
        ("the seed is ignored", ".manual_seed(seed)", ".manual_seed(0)", "test_a_seed_is_a_picture"),
        (
            "another seed",
            ".manual_seed(seed)",
            ".manual_seed(seed + 1)",
            "test_the_first_noise_is_that_of_the_cpu_generator",
        ),
        (
            "the halves of guidance come in the other order",
            "[negative_prompt] * len(prompts) + prompts if guided",
            "prompts + [negative_prompt] * len(prompts) if guided",
            "test_generate_is_guidance_and_ddim_by_hand",
        ),
        (
            "conditioning_scale is ignored",
            "self.scales = [scale] * 13",
            "self.scales = [1.0] * 13",
            "test_scale_zero_is_no_control_and_another_scale_another_picture",
        ),
        (
            "control runs a step too long",
            "(i - self.begin + 1) / count <= self.running[1]",
            "(i - self.begin) / count <= self.running[1]",
            "test_control_runs_only_in_its_window",
        ),
        (
            "the window is one of all steps, not of those that run",
            "count = self.num_steps - self.begin",
            "count = self.num_steps",
            "test_the_window_is_one_of_the_steps_that_run",
        ),
        (
            "guidance 1 is computed all the same",
            "guided = guidance_scale != 1\n",
            "guided = True\n",
            "test_guidance_one_runs_the_model_once_a_step",
        ),
        (
            "the hint's size is not checked",
            "        check_hint(hint, latents)\n",
            "",
            "test_a_hint_of_another_size_or_range_is_refused",
        ),
        (
            "the second ControlNet is dropped",
            "for control in self.controls if self.controlled(i)]",
            "for control in self.controls[:1] if self.controlled(i)]",
            "test_two_controlnets_add_their_residuals",
        ),
        (
            "guess mode turned round",
            "ratio ** (12 - i) for i in range(13)",
            "ratio**i for i in range(13)",
            "test_guess_mode_scales_the_conditional_half_by_hand",
        ),
        (
            "guess mode controls both halves",
            "[torch.zeros_like(c), c]",
            "[c, c]",
            "test_guess_mode_scales_the_conditional_half_by_hand",
        ),
        (
            "guess mode without guidance halves the batch",
            "self.half = guided and (bool(guess_mode) or net.cfg.global_pool)",
            "self.half = bool(guess_mode) or net.cfg.global_pool",
            "test_guess_mode_without_guidance_scales_all",
        ),
        (
            "denoise is ignored",
            "self.step = steps - max(1, round(steps * denoise))",
            "self.step = 0",
            "test_an_image_is_kept_the_more_the_less_is_denoised",
        ),
        (
            "the mask is not put back",
            "if self.image is None or self.mask is None:\n            return pictures",
            "if True:\n            return pictures",
            "test_outside_the_mask_pixels_come_back_unchanged",
        ),
        ("NaN goes on", "if not torch.isfinite(eps).all():", "if eps is None:", "test_nan_names_step_and_remedy"),
        (
            "pictures are cut off, not rounded (as ldm does)",
            ".mul(255).round().byte()",
            ".mul(255).byte()",
            "test_pictures_become_latents_and_back_by_one_scale",
        ),
        (
            "latents are not scaled back before they are decoded",
            ".contiguous() / self.vae.cfg.scaling_factor)",
            ".contiguous())",
            "test_pictures_become_latents_and_back_by_one_scale",
        ),
        (
            "pictures to encode lie in [0, 1]",
            ".float() / 127.5 - 1)",
            ".float() / 255)",
            "test_pictures_become_latents_and_back_by_one_scale",
        ),
    ],
    "minicn/training.py": [
        (
            "a recipe may be out of its ranges",
            '                raise ValueError(f"{each.name} is {value!r}, but must be {expected}")',
            "                pass",
            "test_a_recipe_out_of_range_is_refused",
        ),
        (
            "the loss regresses on the latents",
            "(eps.float() - batch.noise).square()",
            "(eps.float() - batch.latents).square()",
            "test_eq10_only_the_noise_has_no_loss",
        ),
        (
            "the loss is the absolute error",
            "(eps.float() - batch.noise).square()",
            "(eps.float() - batch.noise).abs()",
            "test_eq10_only_the_noise_has_no_loss",
        ),
        (
            "every sample has the batch's loss",
            ".square().mean((1, 2, 3))",
            ".square().mean().expand(len(eps))",
            "test_eq10_the_loss_is_the_mean_square_of_noise_minus_prediction",
        ),
        (
            "latents and noise are swapped in the forward process",
            "ddim.add_noise(batch.latents, batch.noise, alphas",
            "ddim.add_noise(batch.noise, batch.latents, alphas",
            "test_eq10_both_networks_see_the_same_noisy_latents_time_and_text",
        ),
        (
            "all samples are noised as the first",
            "alphas_cumprod[batch.timesteps])",
            "alphas_cumprod[batch.timesteps[:1]])",
            "test_eq10_both_networks_see_the_same_noisy_latents_time_and_text",
        ),
        (
            "the ControlNet sees the clean latents",
            "net(x_t, batch.hints,",
            "net(batch.latents, batch.hints,",
            "test_eq10_both_networks_see_the_same_noisy_latents_time_and_text",
        ),
        (
            "the U-Net gets no control in training",
            "unet(x_t, batch.timesteps, batch.context, control)",
            "unet(x_t, batch.timesteps, batch.context, None)",
            "test_eq10_both_networks_see_the_same_noisy_latents_time_and_text",
        ),
        (
            "the other prompts are dropped",
            "torch.where(dropped, 0, self.prompt[rows])",
            "torch.where(dropped, self.prompt[rows], 0)",
            "test_half_of_the_prompts_are_dropped",
        ),
        (
            "samples are taken for the rows in which they lie",
            "rows = self.rows[samples]",
            "rows = samples % len(self.latents)",
            "test_scenes_are_those_that_the_steps_show",
        ),
        (
            "timesteps from the global stream",
            "torch.randint(ddim.NUM_TRAIN_TIMESTEPS, (size,), generator=random)",
            "torch.randint(ddim.NUM_TRAIN_TIMESTEPS, (size,))",
            "test_a_batch_is_a_function_of_seed_and_step",
        ),
        (
            "every step draws the same batch",
            "seed * 1_000_003 + step",
            "seed * 1_000_003",
            "test_a_batch_is_a_function_of_seed_and_step",
        ),
        (
            "noise depends on the part",
            "send(noise[part], device)",
            "send(noise[: len(samples)], device)",
            "test_the_parts_of_a_batch_are_the_batch",
        ),
        ("hints in [0, 2]", ".float().div(255)", ".float().div(127.5)", "test_hints_of_a_folder_are_read_as_they_are"),
        (
            "the learning rate falls from the start",
            "(steps - step + 1) / (decay * steps)",
            "(steps - step + 1) / steps",
            "test_the_learning_rate_falls_to_zero_over_the_last_share",
        ),
        (
            "connect is ignored",
            'net.only_middle = recipe.connect == "middle"',
            "net.only_middle = False",
            "test_middle_alone_leaves_the_twelve_others_untouched",
        ),
        (
            "the locked U-Net learns",
            'unet.requires_grad_(recipe.unlock == "all")',
            "unet.requires_grad_(True)",
            "test_unlocking_moves_what_it_says_and_nothing_else[none]",
        ),
        (
            "decoder unlocks all",
            'unet.requires_grad_(recipe.unlock == "all")',
            'unet.requires_grad_(recipe.unlock != "none")',
            "test_unlocking_moves_what_it_says_and_nothing_else[decoder]",
        ),
        (
            "unlocked parts learn at the rate of the rest",
            "(recipe.lr, recipe.unlock_lr)",
            "(recipe.lr, recipe.lr)",
            "test_unlocking_moves_what_it_says_and_nothing_else[decoder]",
        ),
    ],
    "minicn/fast.py": [
        (
            "an exchanged norm is a thousandth larger",
            "        return super().forward(x)\n\n\nclass Conv3x3",
            "        return 1.001 * super().forward(x)\n\n\nclass Conv3x3",
            "test_without_fast_gradients_are_the_same",
        ),
        (
            "drawing with exchanged layers is another picture",
            "        h = x[: len(x) // 2]\n",
            "        h = 1.1 * x[: len(x) // 2]\n",
            "test_without_fast_everything_is_right_only_slower",
        ),
        (
            "the mean is not taken off before a norm in channels-last",
            'if x.device.type == "cpu" and not x.is_contiguous():',
            'if x.device.type == "none":',
            "test_group_norm_keeps_its_digits_in_channels_last",
        ),
        (
            "the matrix product swaps rows and columns",
            ".permute(0, 1, 2, 4, 5, 3).flatten(3)",
            ".permute(0, 1, 2, 5, 4, 3).flatten(3)",
            "test_a_wide_convolution_of_a_small_map_is_a_matrix_product",
        ),
        (
            "going back the matrix product swaps rows and columns",
            "+= parts[:, :, :, i, j]",
            "+= parts[:, :, :, j, i]",
            "test_a_wide_convolution_of_a_small_map_is_a_matrix_product",
        ),
        (
            "the gradient of the matrix is transposed",
            ".view(-1, 3, 3, c).permute(0, 3, 1, 2)",
            ".view(-1, 3, 3, c).permute(0, 3, 2, 1)",
            "test_a_wide_convolution_of_a_small_map_is_a_matrix_product",
        ),
        (
            "values made once for all steps are the keys",
            "self.kept = context, super().keys_and_values(context)",
            "self.kept = context, super().keys_and_values(context)[:1] * 2",
            "test_the_text_is_read_once_and_gives_the_same_numbers",
        ),
        (
            "halves of guidance are interleaved",
            "return torch.cat([x, x])",
            "return x.repeat_interleave(2, 0)",
            "test_both_halves_of_guidance_share_what_comes_before_the_text",
        ),
        (
            "gradient checkpointing is ignored",
            "if torch.is_grad_enabled():\n            return checkpoint",
            "if not torch.is_grad_enabled():\n            return checkpoint",
            "test_gradient_checkpointing_changes_nothing_but_memory",
        ),
    ],
    "minicn/checkpoints/files.py": [
        (
            "names of tensors may be anything",
            "            if len(key) > 500 or not key.isprintable():",
            "            if False:",
            "test_names_in_errors_are_text_also_from_python",
        ),
        (
            "folders replace folders",
            "    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):",
            "    if False:",
            "test_a_scene_replaces_nothing_and_is_written_whole",
        ),
        (
            "a file's mappings stay until the garbage collector comes",
            "    return WeightFile(path, get, shapes, dtypes, metadata)\n\n\ndef _open_pickle",
            "    get.opened = WeightFile(path, get, shapes, dtypes, metadata)\n    return get.opened\n\n\ndef _open_pickle",
            "test_a_file_is_let_go_with_its_last_tensor",
        ),
        ("text has no size", "if raw is None or len(raw) > most:", "if not path:", "test_text_has_a_size"),
        (
            "a file is written in its place",
            "            yield Path(fresh, path.name)\n            os.replace(Path(fresh, path.name), path)\n",
            "            yield path\n",
            "test_an_error_half_way_leaves_what_was_there_and_nothing_else",
        ),
        ("JSON has no depth", "while parts and depth < DEPTH:", "while parts:", "test_json_is_read_to_a_depth"),
        (
            "control characters are printed",
            "c if c.isprintable() else",
            "c if c else",
            "test_text_of_files_is_shown_as_text",
        ),
        (
            "an index of shards may name an index",
            ' or name.endswith(".json")',
            "",
            "test_an_index_of_shards_names_no_index",
        ),
        ("NaN is written", "and not finite(tensor):", "and False:", "test_nan_and_infinity_are_not_written"),
        (
            "bits are taken for numbers",
            "if self.dtypes[key] not in FLOATS:",
            "if self.dtypes[key] in SAFETENSORS_DTYPES:",
            "test_what_cannot_be_compared_is_named[4 bits]",
        ),
    ],
    "minicn/checkpoints/pickles.py": [
        ("tuples are keys", "    __hash__ = None", "    hashed = None", "test_tuples_are_no_keys"),
        (
            "storages are as large as they say",
            "if self.claimed > self.size:",
            "if self.claimed < 0:",
            "test_tensors_have_no_more_bytes_than_their_file[a storage of 4 TB]",
        ),
        (
            "a number may stand for a million",
            "if claimed > 2 * size:",
            "if claimed < 0:",
            "test_tensors_have_no_more_bytes_than_their_file[one number 10**13 times]",
        ),
        ("work without end", "if self.work > PICKLE_BYTES // 4:", "if self.work < 0:", "test_a_pickle_costs_its_size"),
        ("a tar is unpacked", "    def fileno(self)", "    def number(self)", "test_a_tar_is_not_unpacked"),
        (
            "records may overlap",
            "if sum(record.file_size for record in records) > size:",
            "if sum(record.file_size for record in records) < 0:",
            "test_records_of_a_zip_that_overlap_are_refused",
        ),
    ],
    "minicn/checkpoints/configs.py": [
        ("no range", "and low <= value <= high", "and True", "test_numbers_out_of_range_and_of_other_types_are_named"),
        (
            "true is a number",
            "else (type(like),))",
            "else (type(like), bool))",
            "test_numbers_out_of_range_and_of_other_types_are_named",
        ),
        ("groups need not divide", "if any(width % ", "if any(0 % ", "test_what_does_not_divide_is_named"),
        (
            "betas may be missing",
            "if config.get(name) is None:  #",
            "if False:  #",
            "test_a_setting_is_honoured_or_refused_by_name",
        ),
    ],
    "minicn/checkpoints/weights.py": [
        ("the last of two wins", "if own in part:", "if own is None:", "test_a_tensor_that_is_held_twice_is_named"),
        ("CLIP's scale is a weight", "|logit_scale|difference)", "|difference)", "test_what_nobody_needs_is_left_aside"),
    ],
    "minicn/checkpoints/models.py": [
        (
            "a model's defaults are not saved",
            "files.write_json(folder / DEFAULTS_FILE, asdict(sd.defaults))",
            "pass",
            "test_defaults_travel_with_a_whole_model",
        ),
        (
            "the difference is not added to the U-Net",
            "whole + found.file.weight(",
            "found.file.weight(",
            "test_difference_files_are_added_to_the_unet",
        ),
        (
            "what a difference file leaves out becomes zero",
            "if name in keys else whole",
            "if name in keys else 0 * whole",
            "test_difference_files_are_added_to_the_unet",
        ),
        (
            "vae_dtype is ignored",
            'precision = vae_dtype or dtype if kind == "vae" else dtype',
            "precision = dtype",
            "test_precision_of_autoencoder_and_networks",
        ),
    ],
    "minicn/conditions/images.py": [
        (
            "a picture may lack its colours",
            'if image.mode == "P" and image.palette is None:',
            "if False:",
            "test_a_palette_that_is_missing_is_said",
        ),
        (
            "an unpacked TIFF has any number of pixels",
            'packed = image.info.get("compression") != "raw"',
            "packed = True",
            "test_an_unpacked_tiff_has_a_bit_for_each_pixel",
        ),
        (
            "broken parts of a PNG stop its pixels",
            "            bare = None if isinstance(error, MemoryError) else _without_metadata(file)",
            "            bare = None",
            "test_broken_parts_of_a_png_do_not_stop_whole_pixels",
        ),
        (
            "pictures have any number of bytes",
            "    if not 0 < (size := os.stat(path).st_size) <= most:",
            "    if (size := os.stat(path).st_size) < 0:",
            "test_a_picture_has_a_number_of_bytes",
        ),
        (
            "thin pictures are enlarged without a limit",
            "    if new[0] * new[1] > MOST_PIXELS:\n",
            "    if False:\n",
            "test_a_thin_pair_is_not_enlarged_without_a_limit",
        ),
        (
            "every format of Pillow is opened",
            "Image.open(file, formats=FORMATS)",
            "Image.open(file)",
            "test_no_other_format_is_opened_whatever_its_name",
        ),
        (
            "turned TIFFs are mapped",
            "Image.open(file, formats=FORMATS)",
            'Image.open(getattr(file, "name", file), formats=FORMATS)',
            "test_broken_metadata_do_not_stop_whole_pixels",
        ),
        (
            "broken metadata stop a picture",
            "    image.load_end = load_end\n",
            "    pass\n",
            "test_broken_metadata_do_not_stop_whole_pixels",
        ),
        (
            "only errors of the system are expected of decoders",
            "    except Exception as error:  # its decoders",
            "    except OSError as error:  # its decoders",
            "test_whatever_a_decoder_raises_is_one_line_with_the_name",
        ),
        (
            "formats hold any size",
            "    if max(image.size) > side:\n",
            "    if False:\n",
            "test_a_format_that_cannot_hold_a_picture_loses_none",
        ),
    ],
    "minicn/conditions/surfaces.py": [
        (
            "a distance of 0 is measured",
            "        unknown |= depth == 0\n",
            "        pass\n",
            "test_a_distance_of_zero_is_no_reading",
        ),
        (
            "every distance of 0 is unknown",
            " and depth[depth != 0].min() > depth.max() / 200:",
            ":",
            "test_a_zero_that_is_only_the_nearest_of_many_is_measured",
        ),
        (
            "black normals are wrong ones",
            "_transparent(image) | (pixels.max(2) < DARKEST)",
            "_transparent(image)",
            "test_black_and_transparent_normals_are_unknown",
        ),
    ],
    "minicn/conditions/poses.py": [
        (
            "absent points of a file are read",
            "point[2:] in ([0], [None])",
            "point[2:] == 0",
            "test_what_an_absent_point_holds_is_not_looked_at",
        ),
        (
            "absent points of an array are read",
            "    people = np.where(people[..., 2:] <= 0, 0, people)\n",
            "",
            "test_absent_points_of_arrays_are_not_looked_at_either",
        ),
        (
            "fractions lie within 0 and 1",
            "np.quantile(np.abs(seen - 0.5), 0.9) <= 1.5",
            "np.abs(seen - 0.5).max() <= 0.5",
            "test_fractions_that_lie_a_little_outside_are_fractions",
        ),
        (
            "any number of people is drawn",
            "    if len(people) > MOST_PEOPLE:\n",
            "    if False:\n",
            "test_more_people_than_can_be_drawn_are_refused",
        ),
    ],
    "minicn/conditions/networks/bodypose.py": [
        (
            "every peak of a plateau is kept",
            "    if len(y) > most:\n",
            "    if False:\n",
            "test_of_a_plateau_of_peaks_some_are_kept",
        ),
    ],
    "minicn/conditions/drawing.py": [
        (
            "a canvas has any size",
            " and height * width <= MOST_PIXELS)",
            ")",
            "test_odd_sizes_are_refused_before_anything_is_drawn",
        ),
    ],
    "minicn/toy/captioning.py": [
        (
            "each colour is a thing",
            "if 0 < verdict <= len(toy.THINGS):",
            "if False:",
            "test_a_thing_of_two_colours_is_one_thing",
        ),
    ],
    "minicn/commands/stopping.py": [
        ("Ctrl-C is a traceback", "sys.excepthook = say", "pass", "test_ctrl_c_in_the_first_second_is_a_word"),
    ],
    "minicn/commands/options.py": [
        (
            "whole numbers have no range",
            "if value is None or not low <= value <= most:",
            "if value is None:",
            "test_train_toy_refuses_in_one_line",
        ),
    ],
    "minicn/commands/generate.py": [
        (
            "defaults replace the settings of a picture",
            "argparse.Namespace(**dict.fromkeys(vars(args)))",
            "None",
            "test_the_settings_of_a_picture_are_used_again",
        ),
        (
            "a hint that was given is not looked at",
            "        look(name, np.asarray(hint), str(path), remedy",
            "        dict(remedy",
            "test_a_hint_that_looks_wrong_is_noted",
        ),
        (
            "a mask is not fitted",
            "mask = mask and conditions.fit(mask, target, hint=True)",
            "pass",
            "test_hint_image_and_mask_are_fitted",
        ),
        (
            "what has no place is lost",
            "        conditions.save_image(picture, instead, pnginfo=settings)\n",
            "        pass\n",
            "test_what_was_drawn_is_kept_where_it_can_be",
        ),
    ],
    "minicn/commands/cli.py": [
        (
            "the command line speaks Python",
            'REMEDY.sub(r"(\\1)", str(message))',
            "str(message)",
            "test_the_command_line_names_options",
        ),
        (
            "what a file claims is taken for memory that ends",
            "    if isinstance(error.__cause__, ValueError):",
            "    if False:",
            "test_what_a_file_claims_is_no_memory_that_ends",
        ),
        (
            "a console that is gone stops the work",
            "        with contextlib.suppress(OSError, ValueError):\n            self.stream.write(text)",
            "        self.stream.write(text)",
            "test_a_console_that_is_gone_or_closed_stops_nothing",
        ),
        (
            "a command that is told to end leaves what it began",
            "lambda end, _: sys.exit(128 + end)",
            "lambda end, _: None",
            "test_data_that_are_not_made_to_the_end_leave_nothing",
        ),
        (
            "an output may replace an input",
            "    if path.exists() and any(given is not None and",
            "    if False and any(given is not None and",
            "test_an_output_never_replaces_an_input",
        ),
        (
            "memory that ends is a traceback",
            "if line is None and not",
            "if not",
            "test_memory_that_ends_is_one_line_with_a_remedy",
        ),
        (
            "what a console lacks stops the work",
            'stream.reconfigure(errors="backslashreplace")',
            "pass",
            "test_what_a_console_cannot_print_stops_nothing",
        ),
    ],
    "minicn/trainer/distributed.py": [
        (
            "the optimiser starts anew",
            "        optimizer.load_state_dict(resuming.as_own(state, optimizer, self.parameters(optimizer)))\n",
            "        pass\n",
            "test_a_stop_within_an_accumulation_loses_nothing",
        ),
        (
            "batches that cannot be shared pass",
            "if recipe.batch_size % (world * recipe.accumulate):",
            "if recipe.batch_size < 0:",
            "test_a_batch_that_cannot_be_shared_is_refused",
        ),
    ],
    "minicn/trainer/examples.py": [
        (
            "kept latents may be NaN",
            '    if not whole or not (files.finite(kept["latents"]) and files.finite(kept["contexts"])):',
            "    if not whole:",
            "test_what_is_kept_encoded_is_looked_at",
        ),
        (
            "what was encoded is encoded again",
            "    if file.metadata[MADE_OF] != made_of:",
            "    if True:",
            "test_what_was_encoded_of_the_same_is_not_encoded_again",
        ),
        (
            "what was encoded of other data is taken",
            "    if file.metadata[MADE_OF] != made_of:",
            "    if False:",
            "test_encoded_data_are_those_of_the_same_rows_captions_pictures_and_order[order]",
        ),
    ],
    "minicn/trainer/loop.py": [
        (
            "parts are not weighed by their share",
            "model(batch, abar).sum() / recipe.batch_size",
            "model(batch, abar).mean()",
            "test_accumulation_gives_the_same_weights",
        ),
        (
            "every part of a step is the first",
            "begin = (spread.rank * recipe.accumulate + i) * share",
            "begin = spread.rank * recipe.accumulate * share",
            "test_accumulation_gives_the_same_weights",
        ),
        (
            "bfloat16 is float32",
            'half = recipe.precision != "float32"',
            "half = False",
            "test_autocast_keeps_the_weights_in_float32[bfloat16]",
        ),
        (
            "gradients are never cleared",
            "            optimizer.zero_grad()\n",
            "",
            "test_a_stop_within_an_accumulation_loses_nothing",
        ),
        (
            "gradient checkpointing is not passed on",
            "    for module in (sd.unet, net):\n",
            "    for module in ():\n",
            "test_gradient_checkpointing_changes_nothing_but_memory",
        ),
    ],
    "minicn/trainer/progress.py": [
        (
            "a run goes on with a ControlNet of another kind",
            "            if found.get(name) is not value:",
            "            if False:",
            "test_a_checkpoint_of_another_run_is_not_damaged_but_another",
        ),
        (
            "a loss of NaN goes on",
            "if not math.isfinite(value):",
            "if value is None:",
            "test_nan_stops_with_step_and_samples",
        ),
        (
            "a checkpoint's weights are not loaded",
            "            part.load_state_dict(state[name])\n",
            "            pass\n",
            "test_a_stop_within_an_accumulation_loses_nothing",
        ),
        (
            "a stop is not heeded",
            "for _, _, loss in self.unread]), self.stop.asked)",
            "for _, _, loss in self.unread]), False)",
            "test_a_stop_within_an_accumulation_loses_nothing",
        ),
        (
            "only every so many steps are looked at",
            " or step in self.score_after or step == last\n                self.saving",
            "\n                self.saving",
            "test_pictures_are_drawn_after_the_steps_asked_for",
        ),
    ],
    "minicn/trainer/recording.py": [
        (
            "a refused run leaves its lock",
            "        if unused:\n",
            "        if False:\n",
            "test_a_refused_run_touches_nothing",
        ),
        (
            "sensitivity compares a hint with itself",
            "others = hints.roll(1, 0) if n > 1 else torch.zeros_like(hints)",
            "others = hints",
            "test_the_log_holds_what_changes",
        ),
        (
            "quarters in the wrong order",
            "QUARTERS = (125, 375, 625, 875)",
            "QUARTERS = (875, 625, 375, 125)",
            "test_the_log_holds_what_changes",
        ),
    ],
    "minicn/trainer/resuming.py": [
        (
            "rates of a checkpoint may be anything",
            "        if not (0 <= lr < 1e3 and all(0 <= beta < 1 for beta in betas)):",
            "        if False:",
            "test_a_checkpoint_is_compared_with_the_run_before_any_of_it_is_used",
        ),
        (
            "steps of a checkpoint may be below 0",
            '        if not each["step"] >= 0:',
            "        if False:",
            "test_a_checkpoint_is_compared_with_the_run_before_any_of_it_is_used",
        ),
        (
            "moments may have any shape",
            '"exp_avg": p, "exp_avg_sq": p} for',
            '"exp_avg": torch.zeros(7), "exp_avg_sq": p} for',
            "test_a_resumed_run_has_its_weights_and_moments",
        ),
        (
            "tensors of any shape are alike",
            "same = (found.shape, found.dtype, found.layout) == (wanted.shape, wanted.dtype, torch.strided)",
            "same = True",
            "test_a_checkpoint_is_compared_with_the_run_before_any_of_it_is_used",
        ),
        (
            "moments keep the layout of where they were saved",
            "torch.empty_strided(p.shape, p.stride()).copy_(old)",
            "old.clone()",
            "test_moments_get_the_memory_layout_of_their_weights",
        ),
        (
            "a lock is opened through links and emptied",
            "os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK",
            "os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK",
            "test_what_lies_in_the_locks_place_is_neither_waited_for_nor_emptied",
        ),
    ],
    "minicn/commands/train.py": [
        (
            "what is drawn and scored is learned from, too",
            "pairs[: count or None], pairs[count:]",
            "pairs[: count or None], pairs",
            "test_the_first_pairs_are_held_out",
        ),
    ],
    "minicn/trainer/data.py": [
        (
            "lines of a table end at U+2028, too",
            '.split("\\n")  # not',
            ".splitlines()  # not",
            "test_lines_end_where_json_says",
        ),
    ],
    "train_toy.py": [
        (
            "errors are tracebacks",
            "with cli.polite_errors(args, run=True):",
            "if True:",
            "test_an_output_folder_that_cannot_be_written_is_said_before_the_work",
        ),
    ],
}

MUTANTS = [Mutant(file, *bug) for file, bugs in BUGS.items() for bug in bugs]
DOZEN = {  # one of each file's most telling, and quick
    "zero layers start as small random values",
    "residuals 1 and 2 are swapped",
    "a decoder block takes its skip first",
    "Z(x + c) instead of x + Z(c)",
    "no gradient behind the outer zero convolution",
    "ControlNet shares the U-Net's memory",
    "std is the variance",
    "words see those after them",
    "padding with 0 (as SD 2)",
    "wrong sign in guidance",
    "conditioning_scale is ignored",
    "the loss regresses on the latents",
}
assert len(DOZEN & {mutant.words for mutant in MUTANTS}) == 12

if __name__ == "__main__":
    sys.exit(main())
