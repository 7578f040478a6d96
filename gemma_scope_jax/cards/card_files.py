"""Feature cards on disk: .npy arrays with one row per feature, and cards.json beside them.

Arrays are memory-mapped, so only the features that are looked at are read.

    cards.json            format, coder, text, settings, stages (what each was made of)
    density               float64 [F]      the share of tokens in the mask on which it is active
    largest, mean         float32 [F]      of its activations on typical tokens (see `examples.py`)
    histogram             int64 [F, bins]  of these activations, in equal bins of (0, largest]
    example_rows          int64 [F, E]     the token an example is around, -1: none
    example_documents     int64 [F, E]     its document
    example_positions     int32 [F, E]     its position in the piece of the document
    example_sources       int32 [F, E]     its file, an index into `sources` in cards.json
    example_tokens        int32 [F, E, W]  ids of the window, -1 outside the piece
    example_values        float32 [F, E, W]
    top_ids, bottom_ids   int32 [F, K]     tokens whose logits the decoder row raises, lowers most
    top_logits, bottom_logits float32 [F, K]
    logit_range           float32 [F, 2]   smallest and largest logit over the vocabulary
    logit_histogram       int32 [F, bins]  of the logits, equal bins between the two
    correlated_ids        int32 [F, K]     features with the largest Pearson correlation, -1: none
    correlated_pearson, correlated_cosine float32 [F, K]
    neighbour_ids, neighbour_cosines       features with the most similar decoder rows
    compared_N_ids, _cosines, _same        the same for another coder's features; and the cosine
                                           with its feature of the same number, NaN: none

The E examples are the `top` strongest, then `each` random ones from each of `groups` equal parts of
(0, largest], the strongest part first.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from gemma_scope_jax.errors import InputError, disk_error
from gemma_scope_jax.storage.atomic import WholeFile, reserve, write_text
from gemma_scope_jax.storage.locks import only_writer
from gemma_scope_jax.storage.manifest import Format
from gemma_scope_jax.storage.paths import expanded, is_remote
from gemma_scope_jax.storage.strict_json import field

FILE = "cards.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Example:
    """A window of T tokens around the token at index `at`."""

    ids: list[int]
    values: list[float]
    at: int
    document: int
    position: int
    source: str  # the document's file, "" if there is none


@dataclasses.dataclass(frozen=True)
class ExampleGroup:
    """Examples of the `count` activations in (low, high]; the group "top" holds the strongest."""

    name: str
    low: float
    high: float
    count: int
    examples: list[Example]


class CardFiles(ExitStack):
    """The arrays of a folder while they are made; those of a stage appear together. The folder is
    locked against other processes until `close`, or the end of a `with` block."""

    def __init__(self, folder: str | os.PathLike, belongs: Any = None):
        """Removes cards from the folder that do not belong to `belongs` (JSON). Raises `InputError`
        for a folder with other arrays, and while another process makes cards there."""
        if is_remote(folder):
            raise InputError(f"{folder}: cards are written to a local folder; copy them from there")
        super().__init__()
        self.folder = expanded(folder)
        self.enter_context(only_writer(self.folder))
        try:
            self._begin(belongs)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise disk_error(folder, error) from error
            raise

    def _begin(self, belongs: Any) -> None:
        path = self.folder / FILE
        self.manifest: dict[str, Any] = _FORMAT.read(path) if path.exists() else {}
        arrays = list(self.folder.glob("*.npy"))
        if arrays and not path.exists():
            raise InputError(f"{self.folder}: holds other arrays than cards; choose another folder")
        another = self.manifest.get("belongs") != belongs
        if another:
            self.manifest = {}
        self.manifest |= {"format": FORMAT, "belongs": belongs}
        if not path.exists():  # the manifest marks the folder as ours
            self._write_manifest()
        if another:
            self._remove(array.stem for array in arrays)

    def make(self, name: str, made_of: Any, write: Callable[..., None], *args: Any) -> None:
        """Make the arrays of a stage by `write(*args, stage)`, unless it was made of the same
        (JSON). They replace earlier ones if no error comes. Raises `InputError` for a full disk."""
        stages = self.manifest.setdefault("stages", {})
        if stages.get(name) == json.loads(json.dumps(made_of)):
            return
        if stages.pop(name, None) is not None:
            self._write_manifest()
        stage = Stage(self.folder)
        try:
            write(*args, stage)
            stage.finish()
        except BaseException:
            stage.discard()
            raise
        held = self.manifest.setdefault("arrays", {})
        self._remove(set(held.get(name, ())) - set(stage.made))
        stages[name], held[name] = made_of, sorted(stage.made)
        self.manifest |= stage.facts
        self._write_manifest()

    def drop(self, stage: str) -> None:
        """Remove a stage that no longer fits the others."""
        if self.manifest.get("stages", {}).pop(stage, None) is None:
            return
        held = self.manifest.get("arrays", {}).pop(stage, ())
        self._write_manifest()
        self._remove(held)

    def _remove(self, arrays: Iterable[str]) -> None:
        for array in arrays:
            (self.folder / f"{array}.npy").unlink(missing_ok=True)

    def _write_manifest(self) -> None:
        text = json.dumps(self.manifest, indent=1, ensure_ascii=False, allow_nan=False)
        write_text(self.folder / FILE, text)


class Stage:
    """Arrays being made; they get their names when all are finished. `facts`: for the manifest."""

    def __init__(self, folder: Path):
        self.folder, self.facts = folder, {}
        self.made: dict[str, np.memmap] = {}
        self._files: dict[str, WholeFile] = {}

    def create(self, name: str, shape: tuple[int, ...], dtype: DTypeLike, fill: int) -> np.ndarray:
        """A memory-mapped array filled with `fill`. Raises `InputError` without space for it."""
        path, kind = self.folder / f"{name}.npy", np.dtype(dtype)
        header: dict[str, Any] = {"fortran_order": False, "shape": shape}
        header["descr"] = np.lib.format.dtype_to_descr(kind)
        try:
            whole = self._files[name] = WholeFile(path)
            np.lib.format.write_array_header_1_0(whole.file, header)
            reserve(whole.file, math.prod(shape) * kind.itemsize)
            array: Any = np.lib.format.open_memmap(whole.temporary, mode="r+")
        except OSError as error:
            raise disk_error(path, error) from error
        if fill != 0:  # a new file is all zeros
            array[...] = fill
        self.made[name] = array
        return array

    def put(self, name: str, array: np.ndarray) -> None:
        """Write an array that is in memory."""
        self.create(name, array.shape, array.dtype, 0)[...] = array

    def finish(self) -> None:
        for name, array in self.made.items():
            try:
                array.flush()
                self._files[name].commit()
            except OSError as error:
                raise disk_error(self.folder / f"{name}.npy", error) from error

    def discard(self) -> None:
        for whole in self._files.values():
            whole.discard()


def _check_manifest(manifest: dict[str, Any], path: os.PathLike) -> None:
    for key in ("stages", "arrays"):
        manifest[key] = field(manifest, key, dict, path, default={})
    for names in manifest["arrays"].values():
        if not isinstance(names, list) or not all(
            isinstance(name, str) and name.isidentifier() for name in names
        ):
            raise InputError(f"{path}: 'arrays' holds something other than lists of names")


_ADVICE = "delete it, and make the cards again"
_FORMAT = Format(
    "the manifest of cards", {"format": FORMAT}, _check_manifest, _ADVICE, mend_text=True
)


def _check_finished(manifest: dict[str, Any], path: Path) -> None:
    """Raise `InputError` unless the manifest holds all that finished cards need."""
    for key in ("coder", "model", "reads", "writes", "gain"):
        field(manifest, key, str, path)
    for key, least in (("layer", 0), ("width", 1)):
        field(manifest, key, int, path, least=least)
    field(manifest, "tokens", int, path, default=0, least=0)
    settings = field(manifest, "settings", dict, path)
    for key in ("top", "groups", "each", "before", "after", "bins", "listed"):
        field(settings, key, int, path, least=key in ("groups", "bins"), most=1 << 20)
    for key in ("sources", "compared"):
        manifest[key] = field(manifest, key, list, path, default=[])


class FeatureCards:
    """The cards in a folder: `cards[name]` is an array, `cards.groups(feature)` its examples.
    Raises `InputError` for a folder without finished cards."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = expanded(folder)
        if not (self.folder / FILE).is_file():
            raise InputError(f"{folder}: holds no feature cards; `gemma-scope cards` makes them")
        self.manifest = _FORMAT.read(self.folder / FILE)
        if "examples" not in self.manifest["stages"]:
            raise InputError(f"{folder}: the cards are not finished; run the same command again")
        _check_finished(self.manifest, self.folder / FILE)
        self._arrays: dict[str, np.ndarray] = {}

    def __contains__(self, name: str) -> bool:
        m = self.manifest
        if m["arrays"] and not any(name in m["arrays"].get(s, ()) for s in m["stages"]):
            return False  # its stage is being made again
        return (self.folder / f"{name}.npy").is_file()

    def __getitem__(self, name: str) -> np.ndarray:
        """A memory-mapped array; see the module's list."""
        if name not in self._arrays:
            path = self.folder / f"{name}.npy"
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
                width = self.manifest.get("width", len(array))
                if array.dtype.kind not in "iuf" or array.shape[:1] != (width,):
                    what = f"{array.dtype} {array.shape}"
                    raise ValueError(f"{what}, not numbers of {width} features")
            except (OSError, ValueError, EOFError, TypeError) as error:
                raise InputError(f"{path}: cannot be read ({error}); make it again") from None
            self._arrays[name] = array
        return self._arrays[name]

    def __len__(self) -> int:
        """The number of features F."""
        return len(self["density"])

    @property
    def settings(self) -> dict[str, Any]:
        return self.manifest["settings"]

    @property
    def tokens(self) -> int | None:
        """The number of tokens in the mask that the cards come from; None: published examples."""
        return self.manifest["tokens"]

    def groups(self, feature: int) -> list[ExampleGroup]:
        """The examples of a feature: the top ones, then the parts of its range from the top."""
        top, each, groups = (self.settings[key] for key in ("top", "each", "groups"))
        counts = self["histogram"][feature].reshape(groups, -1).sum(-1)
        largest, some = float(self["largest"][feature]), self._some(feature, 0, top)
        found = [ExampleGroup("top", 0.0, largest, int(counts.sum()), some)]
        for g in reversed(range(groups)):
            start, width = top + (groups - 1 - g) * each, largest / groups
            some = self._some(feature, start, start + each)
            name = f"{g / groups:.0%} to {(g + 1) / groups:.0%}"
            found.append(ExampleGroup(name, g * width, (g + 1) * width, int(counts[g]), some))
        return found

    def _some(self, feature: int, start: int, stop: int) -> list[Example]:
        before, found = self.settings["before"], []
        ids, values = self["example_tokens"][feature], self["example_values"][feature]
        rows, files = self["example_rows"][feature], self.manifest.get("sources", [])
        for slot in range(start, stop):
            if rows[slot] < 0:
                continue
            kept = np.flatnonzero(ids[slot] >= 0)
            at = int(np.searchsorted(kept, before))
            document = int(self["example_documents"][feature, slot])
            position = int(self["example_positions"][feature, slot])
            source = files[self["example_sources"][feature, slot]] if files else ""
            some = (ids[slot][kept].tolist(), values[slot][kept].tolist())
            found.append(Example(*some, at, document, position, source))
        return found

    def listed(self, name: str, feature: int, *facts: str) -> list[tuple[Any, ...]]:
        """The rows (id, fact, ...) of a list such as "correlated" or "neighbour", at most K."""
        if f"{name}_ids" not in self:
            return []
        ids = self[f"{name}_ids"][feature]
        columns = [self[f"{name}_{fact}"][feature].tolist() for fact in facts]
        return [row for row in zip(ids.tolist(), *columns) if row[0] >= 0]

    def percentiles(self, features: slice) -> np.ndarray:
        """float64 [n, 99]: the 1st to 99th percentiles of each feature's activations. Read from the
        histogram: exact to one bin, 1 / bins of the largest activation."""
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
