"""From what a user names (a path, "toy", a Hugging Face repository) to files on this machine.

huggingface_hub, an optional extra, does the fetching and the caching: what is in its cache works without a network.
"""

import glob
import re
from pathlib import Path

TOY_WEIGHTS = Path(__file__).parents[1] / "toy" / "next"
TOY_BASE = TOY_WEIGHTS / "base"
TOY_CONTROLNETS = TOY_WEIGHTS / "controlnets"  # a folder for each condition: "toy-canny" is canny/
CONDITIONS = 11  # the toy's: a wheel holds the ControlNets of some, the repository those of all
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # the tokenizer of Stable Diffusion 1.5, for files that carry none

WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
PARTS = ("", "unet/", "vae/", "text_encoder/")  # where a repository keeps them: for a ControlNet, for a Stable Diffusion
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(source: str | Path, variant: str | None = None) -> Path:
    """Return the file or folder that a source names; fetch it if it is a repository, or a file in one.

    source   a path, also of a run's folder; "toy" or "toy-canny"; "owner/name"; "owner/name/file.safetensors"
    variant  of a repository's weights, e.g. "fp16"
    Raises FileNotFoundError saying what to install, fetch or name.
    """
    text = str(source)
    if text == "toy":
        return TOY_BASE
    if Path(source).exists():
        return _of_run(Path(source))
    there = ", ".join(sorted(f"toy-{folder.name}" for folder in TOY_CONTROLNETS.glob("*/")))
    if text.startswith("toy-"):
        path = TOY_CONTROLNETS / text.removeprefix("toy-")
        if not path.is_dir():
            more = f"; minicn's repository holds {CONDITIONS}, in minicn/toy/next/controlnets: name the folder of one"
            raise FileNotFoundError(
                f"there is no ControlNet {source}; those that are installed: {there or 'none'}"
                + more * (there.count("toy-") < CONDITIONS)
            )
        return path
    parts = text.split("/")
    if not isinstance(source, str) or not REPOSITORY.fullmatch("/".join(parts[:2])) or ".." in parts or "" in parts:
        raise FileNotFoundError(
            f'{source} is not a file or folder: name one, a Hugging Face repository (owner/name), "toy", or of its '
            f"ControlNets one of {there}"
        )
    if len(parts) > 2:
        return fetch_file("/".join(parts[:2]), "/".join(parts[2:]))
    dot = f".{variant}" if variant else ""
    small = ["*.json", "*/*.json", "tokenizer/*"]
    folder = fetch_folder(text, small + [f"{part}{name}{dot}.safetensors" for part in PARTS for name in WEIGHTS])
    described = [part for part in PARTS if (folder / part / "config.json").is_file()]
    old = [part for part in described if not any((folder / part).glob("*.safetensors"))]  # .bin alone, or in shards
    if old:
        folder = fetch_folder(text, small + [f"{part}{name}{dot}*" for part in old for name in WEIGHTS])
    return folder


def _of_run(path: Path) -> Path:
    """Return the weights in the folder of a training run: all of the model if it was unlocked; any other path as it is."""
    if not path.is_dir() or any((path / name).exists() for name in ("config.json", "model_index.json", "unet")):
        return path
    for name in ("model.safetensors", "controlnet.safetensors"):
        if (path / name).is_file():
            return path / name
    if (path / "checkpoint.pt").is_file():
        raise FileNotFoundError(f"{path} is the folder of a run that has written no weights yet: finish it with --resume")
    return path


def fetch_folder(repository: str, patterns: list[str], only_cached: bool = False) -> Path:
    """Return the folder of a repository's files of these patterns. Raises FileNotFoundError if it is not available."""
    hub = _hub(repository)
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=patterns, local_files_only=only_cached))
    except Exception as error:  # the library's own errors, or its network layer's
        raise FileNotFoundError(_not_had(repository, error)) from error


def fetch_file(repository: str, name: str) -> Path:
    """Return one file of a repository. Raises FileNotFoundError if it is not available."""
    path = fetch_folder(repository, [glob.escape(name)]) / name
    if not path.is_file():
        raise FileNotFoundError(f"{repository} holds no {name}, or it is not in the cache: name another file, or fetch it")
    return path


def tokenizer_folder(source: str | Path) -> Path:
    """Return the tokenizer that a source names: its folder or file, a whole model's folder, or "toy"."""
    path = TOY_BASE if str(source) == "toy" else Path(source)
    return path / "tokenizer" if (path / "tokenizer").is_dir() else path


def default_tokenizer() -> Path:
    """Return the folder of CLIP's tokenizer from the cache. Raises FileNotFoundError if it is not there."""
    try:
        folder = fetch_folder(CLIP_TOKENIZER, ["vocab.json", "merges.txt"], only_cached=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"a single file carries no tokenizer, and {CLIP_TOKENIZER} is not in the cache: give a folder with vocab.json "
            "and merges.txt as tokenizer (--tokenizer)"
        ) from error
    return folder


def _hub(what: str):
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"{what} is not a file or folder here; to fetch it from the Hugging Face hub, run  pip install huggingface_hub"
        ) from error
    return huggingface_hub


def _not_had(what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:160]
    return f"{what} is not a file or folder here, not in the cache, and cannot be fetched ({type(error).__name__}: {reason})"
