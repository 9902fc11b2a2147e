"""Parsers of command lines: help with defaults, values with ranges, errors in one line. Imports nothing that is slow."""

import argparse
import difflib
import math
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage, which --help shows."""

    def parse_known_args(self, args=None, namespace=None):
        """Parse, as argparse does; but nothing may be left over, and of an option that is nearly right, name it."""
        found, extra = super().parse_known_args(args, namespace)
        if extra:
            meant = difflib.get_close_matches(extra[0].split("=")[0], self._option_string_actions, n=1)
            self.error(f"unrecognized arguments: {' '.join(extra)}" + "".join(f"; did you mean {name}?" for name in meant))
        return found, extra

    def error(self, message: str):
        from minicn.checkpoints.files import printable  # imports torch, a second

        self.exit(2, f"error: {printable(message)} ({self.prog} --help lists all options)\n")


def parser(**settings) -> argparse.ArgumentParser:
    """Return an argument parser whose help shows every default."""
    return Parser(formatter_class=Formatter, **settings)


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default behind each option, unless the help states it already, or there is none."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or "(default" in (action.help or ""):
            return action.help or ""
        return super()._get_help_string(action) or ""


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Return a converter of arguments to integers of a range."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        most = min(high, 2**63 - 1)
        if value is None or not low <= value <= most:
            limits = f"from {low}" + (f" to {most}" if high < math.inf or (value or 0) > most else "")
            raise argparse.ArgumentTypeError(f"expected an integer {limits}, got {text!r}")
        return value

    return convert


def number(low: float, high: float) -> Callable[[str], float]:
    """Return a converter of arguments to finite numbers of a range."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low:g} to {high:g}, got {text!r}")
        return value

    return convert
