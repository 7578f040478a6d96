"""The metadata of a feature store: manifest.json, written before the first shard and equal for all
processes, and index.json, written when all shards are complete.

The manifest holds what makes two stores the same (model, coders, text, order, batches, how values
are kept), the number of documents wanted and of those they are drawn from (`shuffled`; null:
document numbers are places in the order), and the versions that wrote it, which are never compared.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from etils import epath

from gemma_scope_jax.coders.coder import Coder, public_name, weights_identity
from gemma_scope_jax.errors import InputError, shown
from gemma_scope_jax.extraction.store.codec import VALUES
from gemma_scope_jax.extraction.store.shards import FeatureList, Shard, shard_name
from gemma_scope_jax.extraction.work import ShardPlan, Size, Text, measure
from gemma_scope_jax.storage.atomic import write_text
from gemma_scope_jax.storage.manifest import Format, digest
from gemma_scope_jax.storage.strict_json import field, read_json

MANIFEST, INDEX = "manifest.json", "index.json"
OTHER = "holds features of another"
_CONTENT = "text_content"  # the text's fingerprint, in stores that identify it by name and size
FORMAT = {"format": "gemma_scope_jax sparse features", "version": 2}
SHARDS = 32  # per job, about
FEWEST, MOST = 16, 32  # batches per shard
LONGEST = 1 << 17  # tokens per shard, if `MOST` small batches are less
_SAME = ("model", "coders", "data", "values", "slots", "precision")


@dataclasses.dataclass(frozen=True)
class ExtractionSettings:
    """How features are extracted and stored."""

    batch_size: int | None = None
    """The sequences in a batch of a process. The default makes batches of 2,048 tokens on a CPU,
    and of 32,768 elsewhere."""
    context_size: int = 1024
    """The tokens in a sequence."""
    seed: int | None = 0
    """The random seed of the order of the documents; None takes them in the order of the files."""
    values: Literal["float16", "float32"] = "float16"
    """How activations are stored; float16 keeps 11 significant bits."""
    slots: int | None = None
    """How many features a token has room for before it takes a slower path. The default is 4 times
    L0."""
    precision: Literal["highest", "high", "default"] = "highest"
    """The precision of the encoders' products: highest is float32; high is three passes of bfloat16
    on TPUs and TF32 on GPUs; default is one pass, and TF32."""
    shard_tokens: int | None = None
    """About how many tokens a shard has. The default makes about 32 shards, of 16 batches or more,
    so that a killed run loses little."""
    share: tuple[int, int] = (0, 1)
    """(i, n): this process makes every n-th shard, from the i-th on."""


@dataclasses.dataclass(frozen=True)
class ExtractionJob:
    """An extraction whose settings are decided."""

    text: Text
    settings: ExtractionSettings
    batch_size: int
    slots: int
    model: Mapping[str, str]
    coders: Sequence[Mapping[str, Any]]

    def per_shard(self, size: Size) -> int:
        """Documents per shard of a text of this size.

        A kill loses at most a shard, and the last batch of each is half empty. So, without
        `shard_tokens`, there are about `SHARDS`, each of `FEWEST` to `MOST` batches.
        """
        batch = self.batch_size * self.settings.context_size
        fitting = max(size.documents * size.mean / SHARDS, FEWEST * batch)
        tokens = self.settings.shard_tokens or min(fitting, max(LONGEST, MOST * batch))
        return max(1, round(tokens / max(size.mean, 1.0)))

    def describe(self) -> dict[str, Any]:
        """The part of the manifest that must be the same to continue a store."""
        text, settings = self.text.data, self.settings
        files, roles = [shown(f) for f in text.files], list(text.roles) if text.messages else None
        data = {"text": self.text.fingerprint, "files": files, "tfds": text.tfds}
        data |= {"seed": self.text.seed, "batch_size": self.batch_size}
        data |= {"context_size": settings.context_size, "roles": roles}
        about = {"model": dict(self.model), "coders": [dict(c) for c in self.coders], "data": data}
        how = {"values": settings.values, "slots": self.slots, "precision": settings.precision}
        return about | how


def describe(name: str, coder: Coder) -> dict[str, Any]:
    """A coder's entry in the manifest."""
    place = {"layers": list(coder.layers), "reads": coder.reads, "writes": coder.writes}
    sizes = {"width": coder.width, "first": coder.first, "l0": coder.info.l0}
    weights = weights_identity(coder)
    return {"name": name, "kind": coder.kind, **place, **sizes, "weights": weights}


def store_digest(settings: Mapping[str, Any]) -> str:
    """A digest of what makes two stores the same, which ties a shard to its store."""
    return digest({key: settings[key] for key in _SAME})


def settle(folder: epath.Path, job: ExtractionJob, tokens: int | None) -> tuple[dict, dict | None]:
    """(the manifest that the store will have, the one it has). Writes nothing.

    Raises `InputError` if the folder holds something else.
    """
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens must be at least 1, not {tokens}")
    if not (folder / MANIFEST).exists():
        if shards_there(folder):
            raise InputError(f"{folder}: holds shards but no {MANIFEST}; choose another folder")
        first = min(coder["first"] for coder in job.coders)
        size = measure(job.text, tokens, first)
        work = {"tokens": tokens, "documents": size.documents, "per_shard": job.per_shard(size)}
        work |= {"mean": size.mean, "share": size.share, "shuffled": job.text.shuffled}
        return FORMAT | job.describe() | work | {"versions": _versions()}, None
    new = old = read_features_manifest(folder)
    now = job.describe()
    check_same(folder, old, now, job.text)
    if old["data"]["text"] != now["data"]["text"]:  # written by a version that used name and size
        new = old | {_CONTENT: now["data"]["text"]}
    if old["tokens"] is not None and (tokens is None or tokens > old["tokens"]):
        documents = measure(job.text, tokens).documents
        if documents > old["documents"]:
            new = new | {"tokens": tokens, "documents": documents}
    return new, old


def check_same(
    folder: epath.Path, old: Mapping[str, Any], now: Mapping[str, Any], text: Text
) -> None:
    """Raise `InputError` if a store, by its manifest `old`, holds features of another text, or has
    other values than `now`, some or all of `ExtractionJob.describe`."""
    data = old["data"]  # a text is identified by its content: its names may differ
    if not text.same_text(old.get(_CONTENT, data.get("text"))):
        what = "its content, order or settings differ, or the tokenizer"
        raise InputError(f"{folder}: {OTHER} text ({what}); choose another folder")
    for key, value in now.items():
        there = old[key]
        if key == "data":
            there = {**there, **{name: value[name] for name in ("text", "files", "tfds")}}
        if key == "coders":
            value = _called_as(list(there), list(value))
        if there != value:
            found = _difference(there, value)
            raise InputError(f"{folder}: {OTHER} {key} ({found}); choose another folder")


def _called_as(there: Sequence[Any], now: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries of coders `now`, under their names in a store if those are paths: coders are
    identified by their weights, and a folder has several paths."""
    found = [dict(coder) for coder in now]
    for old, coder in zip(there, found) if len(there) == len(found) else ():
        name = old["name"]
        if os.path.isabs(name) or os.path.basename(name) == os.path.basename(coder["name"]):
            coder["name"] = name
    return found


def plan_of(manifest: Mapping[str, Any], job: ExtractionJob) -> ShardPlan:
    """The work that a manifest describes."""
    documents, per_shard, mean = (manifest[key] for key in ("documents", "per_shard", "mean"))
    share = manifest.get("share", 1.0)  # in older stores the mean is that of tokens with features
    shape = job.batch_size, job.settings.context_size
    return ShardPlan(job.text, documents, per_shard, *shape, mean, share)


def agree(folder: epath.Path, job: ExtractionJob, tokens: int | None) -> ShardPlan:
    """The plan of the store in the folder, which is begun or extended if necessary."""
    new, old = settle(folder, job, tokens)
    if old is not None and new["documents"] != old["documents"]:
        (folder / INDEX).unlink(missing_ok=True)
        if old["documents"] % old["per_shard"]:  # the last shard was cut short
            (folder / shard_name(old["documents"] // old["per_shard"])).unlink(missing_ok=True)
    if new != old:
        write_text(folder / MANIFEST, json.dumps(new, indent=1))
    return plan_of(new, job)


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(k for k in new if old.get(k) != new[k])
        return f"{key} {_difference(old.get(key), new[key])}"
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return next(_difference(a, b) for a, b in zip(old, new) if a != b)
    short = lambda v: str(v) if len(str(v)) < 60 else str(v)[:57] + "..."
    return f"{short(old)} there, {short(new)} now"


def _versions() -> dict[str, str]:
    found = {}
    for name in ("gemma-scope-jax", "jax", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def read_features_manifest(folder: epath.Path) -> dict[str, Any]:
    """The manifest of a store. Raises `InputError` for folders without one, or a foreign one."""
    path = folder / MANIFEST
    if not path.exists():
        raise InputError(f"{folder}: holds no sparse features ({MANIFEST} is missing)")
    return _FORMAT.read(path)


def lists(manifest: Mapping[str, Any]) -> list[FeatureList]:
    """The feature lists of a store, one per coder and layer, in order."""
    coders = manifest["coders"]
    return [FeatureList(c["name"], layer, c["width"]) for c in coders for layer in c["layers"]]


def _check_manifest(m: dict[str, Any], path: epath.Path) -> None:
    """Raise `InputError` unless every field that is used has a valid type and size."""
    for coder in field(m, "coders", list, path, least=1):
        for key in ("name", "reads", "writes", "kind", "weights"):
            field(coder, key, str, path)
        for key, least in (("width", 1), ("first", 0)):
            field(coder, key, int, path, least=least, most=1 << 40)
        layers = field(coder, "layers", list, path, least=1)
        if not all(type(layer) is int and layer >= 0 for layer in layers):
            raise InputError(f"{path}: layers {layers}")
        field(coder, "l0", float, path, default=None)
    for key in ("name", "dtype", "weights"):
        field(field(m, "model", dict, path), key, str, path)
    data = field(m, "data", dict, path)
    for key in ("batch_size", "context_size"):
        field(data, key, int, path, least=1, most=1 << 40)
    for name in field(data, "files", list, path, default=[]):
        if not isinstance(name, str):
            raise InputError(f"{path}: files {name!r}")
    field(data, "text", str, path)
    if field(m, "values", str, path) not in VALUES:
        raise InputError(f"{path}: values {m['values']!r}")
    for key, default in (("documents", None), ("per_shard", None), ("tokens", 1), ("shuffled", 1)):
        given = {} if default is None else {"default": default}
        field(m, key, int, path, least=1, most=1 << 40, **given)
    for key in ("mean", "share"):
        field(m, key, float, path, default=1.0, least=0)


_FORMAT = Format(
    "the manifest of sparse features",
    FORMAT,
    _check_manifest,
    "extract into another folder, or convert a store of version 1 (packaging/convert_store.py)",
    (*_SAME, "tokens", "documents", "per_shard", "mean"),
)


def shards_there(folder: epath.Path) -> list[int]:
    """The numbers of the shards in a folder."""
    try:
        names = [os.path.basename(os.fspath(p)) for p in folder.iterdir()]
    except FileNotFoundError:  # a bucket's folder exists once something is in it
        return []
    found = (re.fullmatch(r"shard-(\d+)\.json", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def missing(folder: epath.Path, plan: ShardPlan) -> list[int]:
    """The shards that are still missing."""
    there = set(shards_there(folder))
    return [shard for shard in range(plan.shards) if shard not in there]


def finish(folder: epath.Path, plan: ShardPlan) -> bool:
    """Write the index if all shards are complete; returns whether they are.

    A shard that was made for fewer documents is removed, so that it is made again.
    """
    if missing(folder, plan):
        return False
    wanted = store_digest(read_features_manifest(folder))
    with contextlib.suppress(InputError):
        if read_index(folder, plan.documents) is not None:
            return True
    shards = []
    for number in range(plan.shards):
        shards.append(summary(Shard(folder, number), wanted))
        if shards[-1]["documents"] != plan.in_shard(number):
            (folder / shard_name(number)).unlink()
            return False
    write_text(folder / INDEX, json.dumps({"shards": shards}))
    return True


def summary(shard: Shard, store: str) -> dict[str, Any]:
    """A shard's entry in the index. Raises `InputError` if the shard is another store's."""
    footer = shard.footer
    if footer["store"] != store:
        raise InputError(f"{shard.path}: belongs to another store; delete it and extract again")
    segments, none = footer["segments"], [0] * footer["lists"]
    return {
        "shard": footer["shard"],
        "bytes": shard.bytes,
        "documents": len(footer["documents"]),
        "segments": [[s["tokens"], s["counted"]] for s in segments],
        "entries": [sum(of) for of in zip(none, *(s["entries"] for s in segments))],
    }


def read_index(folder: epath.Path, documents: int) -> list[dict[str, Any]] | None:
    """The shards' summaries, in order; None if the store of `documents` is not complete."""
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        shards, total = field(read_json(path), "shards", list, path), 0
        for shard in shards:
            for key in ("shard", "bytes", "documents"):
                field(shard, key, int, path, least=0, most=1 << 40)
            for size in field(shard, "segments", list, path):
                if not _are_whole(size) or len(size) != 2:
                    raise InputError(f"{path}: a segment is {size}")
            if not _are_whole(field(shard, "entries", list, path)):
                raise InputError(f"{path}: entries are {shard['entries']}")
            total += shard["documents"]
    except InputError as error:
        raise InputError(f"{error}; delete it and extract again") from error
    return shards if total == documents else None


def _are_whole(values: Any) -> bool:
    whole = lambda value: type(value) is int and 0 <= value <= 1 << 40
    return isinstance(values, list) and all(map(whole, values))


def name_in_store(store: Any, coder: Coder, name: str = "") -> str:
    """The name of a coder in a feature store, found by its weights and `first`.

    name: the name that it must have there. Raises `InputError` if the store lacks the coder.
    """
    wanted = describe("", coder)
    some = [held for held in store.manifest["coders"] if name in ("", held["name"])]
    if not some:
        raise InputError(f"{store.folder}: no coder {name!r}; one of {', '.join(store.coders)}")
    keys = ("weights", "width", "layers", "reads")
    same = [held for held in some if all(held[key] == wanted[key] for key in keys)]
    for held in same:
        if held["first"] == wanted["first"]:
            return held["name"]
    if same:
        why = f"are from position {same[0]['first']} on, and the coder begins at {coder.first}"
        raise InputError(f"{store.folder}: features of {public_name(coder)} {why}; extract again")
    names = ", ".join(held["name"] for held in some)
    raise InputError(
        f"{store.folder}: holds no features of {public_name(coder)}, but of {names}; extract again"
    )
