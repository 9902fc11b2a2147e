"""The command line itself: quick help, and Ctrl-C at any time."""

import subprocess
import sys

import pytest

from minicn import __main__


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


def test_ctrl_c_while_a_command_is_imported_is_a_word(monkeypatch, capsys):
    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__.importlib, "import_module", stop)
    assert __main__.main(["generate"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_an_unknown_command_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["draw"])
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert all(name in line for name in __main__.COMMANDS)
