"""Feature cards on disk: one .npy array a fact, one row a feature, and cards.json beside them.

Arrays are memory-mapped, so that of a coder of a million features only what is looked at is read.

    cards.json            format, coder, text, settings, stages (what each was made of)
    density               float64 [F]      the share of the counted tokens on which it is active
    largest, mean         float32 [F]      of its activations on typical tokens (see `examples.py`)
    histogram             int64 [F, bins]  how many of those lie in equal bins of (0, largest]
    example_rows          int64 [F, E]     the token an example is around, -1: none
    example_documents     int64 [F, E]     its document
    example_positions     int32 [F, E]     its position in the piece of the document
    example_sources       int32 [F, E]     the document's file: a number in the manifest's `sources`
    example_tokens        int32 [F, E, W]  ids of the window, -1 outside of the piece
    example_values        float32 [F, E, W]
    top_ids, bottom_ids   int32 [F, K]     tokens that the decoder row raises and lowers most
    top_logits, bottom_logits float32 [F, K]
    logit_range           float32 [F, 2]   smallest and largest logit over the vocabulary
    logit_histogram       int32 [F, bins]  of the logits, equal bins between the two
    correlated_ids        int32 [F, K]     features with the largest Pearson correlation, -1: none
    correlated_pearson, correlated_cosine float32 [F, K]
    neighbour_ids, neighbour_cosines       features with the most similar decoder row
    compared_N_ids, _cosines, _same        the same among the features of another coder; and the
                                           cosine with its feature of the same number, NaN: none

E slots: first the `top` strongest, then `each` random ones for each of `groups` equal parts of
(0, largest], the strongest part first.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gemma_scope_jax.buckets import is_remote, write_text
from gemma_scope_jax.errors import InputError

FILE = "cards.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Example:
    """A stretch of text around a token: T tokens, `at` the place among them of that token."""

    ids: list[int]
    values: list[float]
    at: int
    document: int
    position: int
    source: str  # the document's file, "" if there is none


@dataclasses.dataclass(frozen=True)
class Group:
    """Examples of activations in (low, high]; `count` activations lie there. Top: the strongest."""

    name: str
    low: float
    high: float
    count: int
    examples: list[Example]


class CardFiles:
    """The arrays of a folder while they are made: a stage's appear together when all are there."""

    def __init__(self, folder: str | os.PathLike, belongs: Any = None):
        """The folder is emptied of the cards of anything else than `belongs` (JSON) says.

        Raises `InputError` for one with arrays that are no cards.
        """
        if is_remote(folder):
            raise InputError(f"{folder}: cards are written to a local folder; copy them from there")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / FILE
        self.manifest: dict[str, Any] = read_cards_manifest(path) if path.exists() else {}
        arrays = (array for array in self.folder.glob("*.npy") if array.name[0] != ".")
        if not path.exists() and any(True for _ in arrays):
            raise InputError(f"{folder}: holds arrays that are no cards; choose another folder")
        if self.manifest.get("belongs") != belongs:
            self.manifest = {}
            for array in self.folder.glob("*.npy"):
                array.unlink()
        self.manifest |= {"format": FORMAT, "belongs": belongs}
        if not path.exists():  # which says that the folder is ours
            self._write_manifest()

    def has(self, stage: str, made_of: Any) -> bool:
        """Whether a stage is there and was made of the same (JSON)."""
        return self.manifest.get("stages", {}).get(stage) == json.loads(json.dumps(made_of))

    @contextmanager
    def stage(self, name: str, made_of: Any) -> Iterator["Stage"]:
        """Make the arrays of a stage: they and `made_of` are kept if the block ends well."""
        stages = self.manifest.setdefault("stages", {})
        if stages.pop(name, None) is not None:
            self._write_manifest()
        stage = Stage(self.folder)
        try:
            yield stage
            stage.finish()
        except BaseException:
            stage.discard()
            raise
        stages[name] = made_of
        self.manifest |= stage.facts
        self._write_manifest()

    def _write_manifest(self) -> None:
        text = json.dumps(self.manifest, indent=1, ensure_ascii=False, allow_nan=False)
        write_text(self.folder / FILE, text)  # type: ignore[arg-type]


class Stage:
    """Arrays being made, under temporary names; `facts` go into the manifest."""

    def __init__(self, folder: Path):
        self.folder, self.facts = folder, {}
        self._made: dict[str, np.memmap] = {}

    def create(self, name: str, shape: tuple[int, ...], dtype: Any, fill: Any) -> np.ndarray:
        """A memory-mapped array filled with `fill`."""
        path = self.folder / f".{name}.npy"
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
        if fill != 0:  # a new file is all zeros
            array[...] = fill
        self._made[name] = array
        return array

    def put(self, name: str, array: np.ndarray) -> None:
        """An array that is in memory."""
        self.create(name, array.shape, array.dtype, 0)[...] = array

    def finish(self) -> None:
        for name, array in self._made.items():
            array.flush()
            os.replace(self.folder / f".{name}.npy", self.folder / f"{name}.npy")

    def discard(self) -> None:
        for name in self._made:
            (self.folder / f".{name}.npy").unlink(missing_ok=True)


def read_cards_manifest(path: Path) -> dict[str, Any]:
    """cards.json. Raises `InputError` if it is broken or of another format."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and isinstance(manifest.get("stages", {}), dict)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the manifest of cards ({error}); delete it") from None
    if not known:
        raise InputError(f"{path}: of another version of this program; make the cards again")
    return manifest


class FeatureCards:
    """The cards in a folder: `cards[name]` an array, `cards.groups(feature)` its examples."""

    def __init__(self, folder: str | os.PathLike):
        """Raises `InputError` where there are no cards, or no finished ones."""
        self.folder = Path(folder)
        if not (self.folder / FILE).is_file():
            raise InputError(f"{folder}: holds no feature cards; `gemma-scope cards` makes them")
        self.manifest = read_cards_manifest(self.folder / FILE)
        if "examples" not in self.manifest.get("stages", {}):
            raise InputError(f"{folder}: the cards are not finished; run the same command again")
        self._arrays: dict[str, np.ndarray] = {}

    def __contains__(self, name: str) -> bool:
        return (self.folder / f"{name}.npy").is_file()

    def __getitem__(self, name: str) -> np.ndarray:
        """A memory-mapped array; see the module's list."""
        if name not in self._arrays:
            path = self.folder / f"{name}.npy"
            try:
                self._arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise InputError(f"{path}: cannot be read ({error}); make it again") from None
        return self._arrays[name]

    def __len__(self) -> int:
        """The number of features F."""
        return len(self["density"])

    @property
    def settings(self) -> dict[str, Any]:
        return self.manifest["settings"]

    @property
    def tokens(self) -> int | None:
        """How many tokens the cards come from: those that count. None: published examples."""
        return self.manifest["tokens"]

    def window(self) -> tuple[int, int]:
        """How many tokens are before and after the one that an example is around."""
        return self.settings["before"], self.settings["after"]

    def groups(self, feature: int) -> list[Group]:
        """The examples of a feature: the top ones, then the parts of its range from the top."""
        s, largest = self.settings, float(self["largest"][feature])
        counts = self["histogram"][feature].reshape(s["groups"], -1).sum(-1)
        width = largest / s["groups"]
        found = [Group("top", 0.0, largest, int(counts.sum()), self._some(feature, 0, s["top"]))]
        for g in reversed(range(s["groups"])):
            start = s["top"] + (s["groups"] - 1 - g) * s["each"]
            some = self._some(feature, start, start + s["each"])
            name = f"{g / s['groups']:.0%} to {(g + 1) / s['groups']:.0%}"
            found.append(Group(name, g * width, (g + 1) * width, int(counts[g]), some))
        return found

    def _some(self, feature: int, start: int, stop: int) -> list[Example]:
        before, found = self.settings["before"], []
        ids, values = self["example_tokens"][feature], self["example_values"][feature]
        rows, files = self["example_rows"][feature], self.manifest.get("sources", [])
        for slot in range(start, stop):
            if rows[slot] < 0:
                continue
            kept = np.flatnonzero(ids[slot] >= 0)
            found.append(
                Example(
                    ids[slot][kept].tolist(), values[slot][kept].tolist(),
                    int(np.searchsorted(kept, before)),
                    int(self["example_documents"][feature, slot]),
                    int(self["example_positions"][feature, slot]),
                    files[self["example_sources"][feature, slot]] if files else "",
                )
            )  # fmt: skip
        return found

    def listed(self, name: str, feature: int, *facts: str) -> list[tuple[Any, ...]]:
        """Rows (id, fact, ...) of a list such as "correlated" or "neighbour"; it may be short."""
        if f"{name}_ids" not in self:
            return []
        ids = self[f"{name}_ids"][feature]
        columns = [self[f"{name}_{fact}"][feature].tolist() for fact in facts]
        return [row for row in zip(ids.tolist(), *columns) if row[0] >= 0]

    def percentiles(self, features: slice) -> np.ndarray:
        """float64 [n, 99]: activation below which 1 %, 2 %, ... of each feature's lie.

        Read off the histogram, so right to within one bin, 1 / bins of the largest.
        """
        counts = np.asarray(self["histogram"][features], np.float64)
        largest = np.asarray(self["largest"][features], np.float64)
        bins = counts.shape[1]
        below = np.concatenate([np.zeros((len(counts), 1)), counts.cumsum(-1)], -1)
        wanted = below[:, -1:] * np.arange(1, 100) / 100
        left = np.clip((below[:, None, 1:-1] < wanted[..., None]).sum(-1), 0, bins - 1)
        at = np.take_along_axis(below, left, -1)
        inside = np.take_along_axis(counts, left, -1)
        share = np.where(inside > 0, (wanted - at) / np.maximum(inside, 1), 0.0)
        return (left + share) / bins * largest[:, None]


@contextmanager
def new_folder(folder: Path, *marks: str) -> Iterator[Path]:
    """A folder to write into that takes its name, over an old one, if the block ends well.

    marks: glob patterns of files, one of which the old one has; `InputError` if it is another's.
    """
    is_ours = any(True for mark in marks for _ in folder.glob(mark))
    if folder.is_dir() and any(folder.iterdir()) and not is_ours:
        raise InputError(
            f"{folder}: is in the way, and was not made here; move it, or choose another folder"
        )
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def identity(value: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that tell JSON-able facts from others."""
    import hashlib

    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
