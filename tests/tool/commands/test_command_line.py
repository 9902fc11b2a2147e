"""The command line itself: quick help, and Ctrl-C at any time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minicn import __main__

ROOT = Path(__file__).parents[3]


def test_help_names_every_command_without_importing_torch():
    code = "import sys; from minicn.__main__ import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"\n    {name}" in done.stdout for name in __main__.COMMANDS)


def test_importing_minicn_imports_torch_with_the_first_name_only():
    code = "import sys, minicn; assert 'torch' not in sys.modules; minicn.UNet; assert 'torch' in sys.modules; dir(minicn)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", __main__.COMMANDS)
def test_every_command_has_its_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main([command, "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(f"usage: minicn {command} ")
    assert len(shown) > 200  # its options, too


@pytest.mark.parametrize(
    ("given", "said"),
    [("--promt=x", "unrecognized arguments: --promt=x; did you mean --prompt? ("), ("--xyzzy", "arguments: --xyzzy (")],
)
def test_an_option_that_is_nearly_right_is_named(given, said, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["generate", given])
    assert stop.value.code == 2
    assert said + "minicn generate --help lists all options)" in capsys.readouterr().err


def test_ctrl_c_while_a_command_is_imported_is_a_word(monkeypatch, capsys):
    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__.importlib, "import_module", stop)
    assert __main__.main(["generate"]) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize(
    ("started", "package"),
    [
        ("train_toy.py", "numpy"),
        ("train_toy.py", "torch"),
        ("-m minicn generate", "torch"),
        ("-m minicn scene 1 --output scene", "PIL"),
    ],
)
def test_ctrl_c_in_the_first_second_is_a_word(started, package, tmp_path):
    """For whatever people start, and whichever of the slow packages is being imported: none gets to its code here."""
    (tmp_path / f"{package}.py").write_text("raise KeyboardInterrupt\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, *started.replace("train_toy.py", str(ROOT / "train_toy.py")).split()]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stderr, done.stdout) == ("stopped\n", "")
    assert done.returncode in (130, -2)


def test_an_unknown_command_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["draw"])
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert all(name in line for name in __main__.COMMANDS)
