"""How close is close? Whatever is compared up to rounding is compared here, with a tolerance that has a reason.

Same kernel, same shapes: use torch.equal. Mathematics: float64 on both sides (`assert_close`). float32 by two ways that
round differently: the new way may be no further from the float64 result than a few times the plain way is
(`assert_as_exact`), so the tolerance grows and shrinks with the processor's own rounding.

The share of its tolerance that a comparison used is kept; pytest's summary prints the largest.
"""

from collections.abc import Sequence

from torch import Tensor, finfo

USED: list[float] = []  # error / tolerance of each comparison of the test that runs


def keep(error: float, tolerance: float) -> None:
    """Note the share of a tolerance that an error took, and refuse more than all of it."""
    USED.append(error / tolerance)
    assert error <= tolerance, f"off by {error:.3g}, allowed are {tolerance:.3g}"


def assert_close(got: Tensor, want: Tensor, rtol: float = 1e-10) -> None:
    """Compare with what is wanted, relative to its largest value, which must not be zero. For float64.

    1e-10 is a million roundings of float64 (1e-16): room for every order of a sum, none for another formula.
    """
    assert got.shape == want.shape
    scale = want.abs().max().item()
    assert scale > 0
    keep((got - want).abs().max().item(), rtol * scale)


def assert_as_exact(
    got: Tensor | Sequence[Tensor], plain: Tensor | Sequence[Tensor], exact: Tensor | Sequence[Tensor], times: float = 8
) -> None:
    """Compare two float32 ways with the same in float64: `got` may be `times` as far from it as `plain` is.

    Distances are those of all numbers together (root of the sum of squares). Where the plain way is exact by chance, it is
    taken to be off by half a unit in the last place, which no float32 result can better on average.
    """
    if isinstance(got, Tensor):
        got, plain, exact = [got], [plain], [exact]
    for mine, theirs, true in zip(got, plain, exact, strict=True):
        assert mine.shape == theirs.shape == true.shape
        assert mine.dtype == theirs.dtype
        assert str(true.dtype) == "torch.float64"
        assert true.any()
        least = finfo(mine.dtype).eps / 2 * true.norm().item()
        keep((mine - true).norm().item(), times * max((theirs - true).norm().item(), least))
