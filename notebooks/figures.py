"""What the notebooks show with: pictures in a grid, captions, and the source of what minicn defines."""

import importlib.util
import inspect
import io
import textwrap


class Missing(Exception):
    """Something must be installed first: shown as one sentence, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # asked for by IPython
        return [str(self)]


missing = [name for name in ("torch", "minicn", "matplotlib") if importlib.util.find_spec(name) is None]
if missing:
    raise Missing(
        f"{' and '.join(missing)} cannot be imported: run  pip install -r requirements.txt -e '.[notebooks]'  "
        "in the folder above this one, then restart the kernel"
    )

import minicn  # noqa: E402, F401  (before PyTorch is loaded: it bounds how long threads spin, see minicn/threads.py)

# isort: split
import matplotlib.pyplot as plt  # noqa: E402
from IPython.display import Image, Markdown, display  # noqa: E402

plt.rcParams |= {"figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}


def pictures(rows, titles=(), row_titles=(), caption: str = "", size: float = 1.5) -> None:
    """Show pictures in a grid.

    rows        a list of pictures, or a list of such rows: PIL pictures, arrays (H, W, 3) or (H, W), or None for a gap
    titles      above the columns
    row_titles  left of the rows
    caption     below the figure
    size        of a picture, inches
    """
    if not isinstance(rows[0], list | tuple):
        rows = [rows]
    columns = max(map(len, rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=(size * columns, size * len(rows)), squeeze=False)
    for i, row in enumerate(rows):
        for j, axis in enumerate(axes[i]):
            axis.set_xticks([]), axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if j < len(row) and row[j] is not None:
                axis.imshow(row[j], cmap="gray", interpolation="nearest")
            if i == 0 and j < len(titles):
                axis.set_title(titles[j], fontsize=9)
        if i < len(row_titles):
            axes[i][0].set_ylabel(row_titles[i], fontsize=9)
    figure.tight_layout(pad=0.3)
    file = io.BytesIO()  # a JPEG: noise as PNG would weigh megabytes
    figure.savefig(file, format="jpeg", bbox_inches="tight", pil_kwargs={"quality": 85})
    plt.close(figure)
    display(Image(file.getvalue(), format="jpeg"))
    say(caption)


def say(caption: str) -> None:
    """Show a caption below what came before."""
    if caption:
        display(Markdown(f"*{caption}*"))


def source(*definitions) -> None:
    """Show the source of functions, classes or methods."""
    code = "\n\n".join(textwrap.dedent(inspect.getsource(each)).rstrip() for each in definitions)
    display(Markdown(f"```python\n{code}\n```"))
