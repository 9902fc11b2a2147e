"""`minicn check-device`: what agrees holds, what does not is said, and the exit status tells which."""

import contextlib

import pytest
import torch

from minicn import __main__
from minicn.commands import check_device

OTHER = torch.device("cpu", 0)  # computes as the CPU does; "cpu" without a number is what it is compared with
SMALL = dict(num_steps=1, steps=2, early=1, timed=1)


@pytest.fixture(autouse=True)
def _one_half(monkeypatch):
    """Without float16, which CPUs compute slowly."""
    has = check_device.has
    monkeypatch.setattr(check_device, "has", lambda device, dtype: dtype != torch.float16 and has(device, dtype))


def rows_of(text: str) -> dict[str, list[str]]:
    """Return the cells of the comparisons' rows by the beginning of the first one, up to its unit."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {
        row[0].split(" (")[0]: row[1:]
        for row in cells
        if len(row) == 5 and row[2].strip("-") and row[0] != "against the CPU"
    }


def test_the_cpu_holds_against_itself():
    """Every comparison is there and holds; float32 trains by the very same gradients; a machine and two times are named."""
    text, holds = check_device.check(OTHER, **SMALL)
    rows = rows_of(text)
    assert holds
    assert list(rows) == [
        "picture, float32",
        "picture, bfloat16",
        "loss of 2 training steps, float32",
        "gradients of 1 training steps, float32",
        "loss of 1 training steps, bfloat16",
        "gradients of 1 training steps, bfloat16",
    ]
    assert {row[2] for row in rows.values()} == {"holds"}
    assert rows["gradients of 1 training steps, float32"][0] == "0"
    assert 0 < float(rows["picture, float32"][0]) < 0.01 < float(rows["picture, bfloat16"][0])
    assert f"| {torch.__version__}, " in text
    assert "| not on this device | float16 |" in text
    times = [line for line in text.splitlines() if line.startswith(("| a picture, 2 steps", "| a training step"))]
    assert len(times) == 2
    assert all(float(cell) > 0 for line in times for cell in line.strip("|").split("|")[1:])


def test_a_device_that_computes_something_else_fails(monkeypatch):
    """A norm with another eps, on the device alone: picture, loss and gradients in float32 are found to be off."""
    monkeypatch.setattr(check_device, "has", lambda device, dtype: False)
    monkeypatch.setattr(check_device, "seconds", lambda *args: (1.0, 1.0))
    norm = torch.nn.functional.group_norm

    def on_device(function):
        def run(device, *args):
            wrong = {"picture": 1e-3, "trained": 1e-2}[function.__name__]
            with monkeypatch.context() as patch:
                if device.index is not None:
                    patch.setattr(torch.nn.functional, "group_norm", lambda x, g, w, b, eps: norm(x, g, w, b, eps + wrong))
                return function(device, *args)

        return run

    for name in ("picture", "trained"):
        monkeypatch.setattr(check_device, name, on_device(getattr(check_device, name)))
    text, holds = check_device.check(OTHER, **SMALL)
    verdicts = {what: row[2] for what, row in rows_of(text).items() if "float32" in what}
    assert not holds
    assert set(verdicts.values()) == {"FAILS"}, text


def test_an_error_of_the_device_is_a_row_that_fails(monkeypatch):
    """What the device says stands in the table, on one line, and the rest goes on."""

    def picture(device, dtype, num_steps):
        if dtype == torch.float64:
            return torch.zeros(1, 3, 128, 128, dtype=torch.float64)
        raise NotImplementedError("aten::some_op | is not\nimplemented for MPS")

    monkeypatch.setattr(check_device, "picture", picture)
    monkeypatch.setattr(check_device, "trained", lambda device, examples, *args: (torch.ones(1), {2: 0.5}))
    monkeypatch.setattr(check_device, "seconds", lambda *args: (1.0, 1.0))
    text, holds = check_device.check(OTHER, **SMALL)
    rows = rows_of(text)
    assert not holds
    assert rows["picture, float32"][0] == "-"
    assert rows["picture, float32"][2:] == ["FAILS", "NotImplementedError: aten::some_op / is not implemented for MPS"]
    assert rows["loss of 2 training steps, float32"][2] == "holds"


def test_what_is_no_number_does_not_hold():
    assert not check_device.Row("picture", float("nan"), 1.0, "").holds
    assert check_device.Row("picture", 1.0, 1.0, "").holds


def test_tf32_is_off_where_float32_is_compared_and_as_before_afterwards(monkeypatch):
    """As the user set it, also after an error."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    with contextlib.suppress(KeyError), check_device.whole_float32():
        seen += [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]
        raise KeyError
    assert seen == [False, False]
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("holds", "status"), [(True, 0), (False, 1)])
def test_the_exit_status_says_whether_all_held(monkeypatch, capsys, holds, status):
    monkeypatch.setattr(check_device, "check", lambda device: (f"table of {device}", holds))
    try:
        code = __main__.main(["check-device", "--device", "cpu"])
    except SystemExit as stopped:
        code = stopped.code
    assert code == status
    assert capsys.readouterr().out == "table of cpu\n"


@pytest.mark.parametrize("device", ["cuda:99", "mps:7", "abacus", "meta"])
def test_a_device_that_is_not_there_is_refused(refused, device):
    """One line, exit status 2."""
    assert refused(__main__.main, ["check-device", "--device", device]).startswith(f"error: device '{device}'")
