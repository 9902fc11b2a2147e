"""Ctrl-C while PyTorch is still being imported: a word, not a traceback. Imported before all else by what people start."""

import sys
from types import TracebackType


def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show what ended the program: "stopped" for Ctrl-C, anything else as Python does."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = say
