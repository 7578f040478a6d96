"""What a feature store says of itself: manifest.json, written before the first shard and equal for
all processes, and index.json, written when every shard is there.

The manifest holds what makes two stores the same (model, coders, text, order, batches, how values
are kept), how many documents are wanted, of how many they are drawn (`shuffled`; null: their
numbers count the order), and the versions that wrote it, which nothing compares.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gemma_scope_jax.coders.coder import Coder, public_name, weights_identity
from gemma_scope_jax.errors import InputError, shown
from gemma_scope_jax.extraction.store.codec import VALUES
from gemma_scope_jax.extraction.store.shards import FeatureList, Shard, shard_name
from gemma_scope_jax.extraction.work import ShardPlan, Size, Text, measure
from gemma_scope_jax.storage.atomic import write_text
from gemma_scope_jax.storage.manifest import Format, digest
from gemma_scope_jax.storage.strict_json import field, read_json

MANIFEST, INDEX = "manifest.json", "index.json"
_CONTENT = "text_content"  # what a text holds, in stores begun when it was known by name and size
FORMAT = {"format": "gemma_scope_jax sparse features", "version": 2}
SHARDS = 32  # of a job, about
FEWEST, MOST = 16, 32  # batches of a shard
LONGEST = 1 << 17  # tokens of a shard, if `MOST` small batches are less
_SAME = ("model", "coders", "data", "values", "slots", "precision")


@dataclasses.dataclass(frozen=True)
class ExtractionJob:
    """The settings of an extraction."""

    text: Text
    batch_size: int
    context_size: int
    values: str
    slots: int
    precision: str
    shard_tokens: int | None
    model: Mapping[str, str]
    coders: Sequence[Mapping[str, Any]]

    def per_shard(self, size: Size) -> int:
        """Documents of a shard of a text of this size, which `shard_tokens` decides, or the job:
        a kill loses a shard at the most, processes share shards, and the last batch of each is
        half empty. So there are about `SHARDS`, but none has less than `FEWEST` batches or more
        than `MOST`.
        """
        batch = self.batch_size * self.context_size
        fitting = max(size.documents * size.mean / SHARDS, FEWEST * batch)
        tokens = self.shard_tokens or min(fitting, max(LONGEST, MOST * batch))
        return max(1, round(tokens / max(size.mean, 1.0)))

    def describe(self) -> dict[str, Any]:
        """The part of the manifest that must be the same on going on."""
        data = {
            "text": self.text.fingerprint,
            "files": [shown(f) for f in self.text.data.files],
            "tfds": self.text.data.tfds,
            "seed": self.text.seed,
            "batch_size": self.batch_size,
            "context_size": self.context_size,
            "roles": list(self.text.data.roles) if self.text.data.messages else None,
        }
        return {
            "model": dict(self.model),
            "coders": [dict(c) for c in self.coders],
            "data": data,
            "values": self.values,
            "slots": self.slots,
            "precision": self.precision,
        }


def describe(name: str, coder: Coder) -> dict[str, Any]:
    """What a manifest says of a coder."""
    return {
        "name": name,
        "kind": coder.kind,
        "layers": list(coder.layers),
        "reads": coder.reads,
        "writes": coder.writes,
        "width": coder.width,
        "first": coder.first,
        "l0": coder.info.l0,
        "weights": weights_identity(coder),
    }


def store_digest(settings: Mapping[str, Any]) -> str:
    """What ties a shard to its store: a digest of what two stores must share to be the same."""
    return digest({key: settings[key] for key in _SAME})


def settle(
    folder: Any, job: ExtractionJob, tokens: int | None
) -> tuple[dict[str, Any], dict | None]:
    """(the manifest that the store is to have, the one that is there). Writes nothing.

    Raises `InputError` if what is there is something else.
    """
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens must be at least 1, not {tokens}")
    if not (folder / MANIFEST).exists():
        if shards_there(folder):
            raise InputError(f"{folder}: holds shards but no {MANIFEST}; choose another folder")
        first = min(coder["first"] for coder in job.coders)
        size = measure(job.text, tokens, first)
        work = {
            "tokens": tokens,
            "documents": size.documents,
            "per_shard": job.per_shard(size),
            "mean": size.mean,
            "share": size.share,
            "shuffled": job.text.shuffled,
        }
        return FORMAT | job.describe() | work | {"versions": _versions()}, None
    new = old = read_features_manifest(folder)
    for key, value in job.describe().items():
        there = old[key]
        if key == "data":
            there = _of_this_text(old, value, job, folder)
            if old["data"]["text"] != value["text"]:  # of an older version: told by name and size
                new = old | {_CONTENT: value["text"]}
        if key == "coders":
            value = _called_as(list(there), list(value))
        if _content(there) != _content(value):
            raise InputError(
                f"{folder}: holds features of another {key} ({_difference(there, value)}); "
                "choose another folder"
            )
    everything = old["tokens"] is None
    if everything or (tokens is not None and tokens <= old["tokens"]):
        return new, old
    documents = measure(job.text, tokens).documents
    if documents <= old["documents"]:
        return new, old
    return new | {"tokens": tokens, "documents": documents}, old


def _of_this_text(
    old: Mapping[str, Any], now: dict, job: ExtractionJob, folder: Any
) -> dict[str, Any]:
    """What a manifest says of its text, which is known by its content: how it is called may differ.

    Raises `InputError` for another text.
    """
    there = old["data"]
    if not job.text.same_text(old.get(_CONTENT, there.get("text"))):
        raise InputError(
            f"{folder}: holds features of another data (text: what it holds, its order, its "
            "settings or the tokenizer differ); choose another folder"
        )
    return {**there, **{key: now[key] for key in ("text", "files", "tfds")}}


def _called_as(there: Sequence[Any], now: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is said of coders now, under the names that a store has for them if those are paths:
    coders are known by their weights, and folders by any of their paths."""
    if len(there) != len(now):
        return [dict(coder) for coder in now]
    path = lambda old, new: os.path.isabs(old) or os.path.basename(old) == os.path.basename(new)
    return [
        {**coder, "name": old["name"] if path(old["name"], coder["name"]) else coder["name"]}
        for old, coder in zip(there, now)
    ]


def plan_of(manifest: Mapping[str, Any], job: ExtractionJob) -> ShardPlan:
    """The work that a manifest describes."""
    m = manifest
    share = m.get("share", 1.0)  # of older stores the mean is of tokens that count
    return ShardPlan(
        job.text, m["documents"], m["per_shard"], job.batch_size, job.context_size, m["mean"], share
    )


def agree(folder: Any, job: ExtractionJob, tokens: int | None) -> ShardPlan:
    """The plan of the store in the folder, begun or extended here if need be."""
    new, old = settle(folder, job, tokens)
    if old is not None and new["documents"] != old["documents"]:
        (folder / INDEX).unlink(missing_ok=True)
        if old["documents"] % old["per_shard"]:  # the last shard was cut short: made anew
            (folder / shard_name(old["documents"] // old["per_shard"])).unlink(missing_ok=True)
    if new != old:
        write_text(folder / MANIFEST, json.dumps(new, indent=1))
    return plan_of(new, job)


def _content(value: Any) -> Any:
    """Of what a manifest says: without where files lie, as the text has a fingerprint."""
    if isinstance(value, dict):
        return {key: v for key, v in value.items() if key != "files"}
    return value


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        old, new = _content(old), _content(new)
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


def read_features_manifest(folder: Any) -> dict[str, Any]:
    """The manifest of a store. Raises `InputError` for folders that have none, or another's."""
    path = folder / MANIFEST
    if not path.exists():
        raise InputError(f"{folder}: holds no sparse features ({MANIFEST} is missing)")
    return _FORMAT.read(path)


def lists(manifest: Mapping[str, Any]) -> list[FeatureList]:
    """What a store holds of every coder's layer, in order."""
    return [
        FeatureList(coder["name"], layer, coder["width"])
        for coder in manifest["coders"]
        for layer in coder["layers"]
    ]


def _check_manifest(m: dict[str, Any], path: Any) -> None:
    """Raise `InputError` unless what is read of a manifest has its type and size."""
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


def shards_there(folder: Any) -> list[int]:
    """The numbers of the shards in a folder."""
    try:
        names = [os.path.basename(os.fspath(p)) for p in folder.iterdir()]
    except FileNotFoundError:  # a bucket's folder is there when something is in it
        return []
    found = [
        n.removeprefix("shard-").removesuffix(".json")
        for n in names
        if n.startswith("shard-") and n.endswith(".json")
    ]
    return sorted(int(n) for n in found if n.isdigit())


def missing(folder: Any, plan: ShardPlan) -> list[int]:
    """The shards still to be made."""
    there = set(shards_there(folder))
    return [shard for shard in range(plan.shards) if shard not in there]


def finish(folder: Any, plan: ShardPlan) -> bool:
    """Write the index if every shard is there, and whole; returns whether it is.

    A shard that was made for fewer documents is removed, to be made anew.
    """
    if missing(folder, plan):
        return False
    wanted = store_digest(read_features_manifest(folder))
    if _holds(folder, plan.documents):
        return True
    shards = []
    for number in range(plan.shards):
        shards.append(summary(Shard(folder, number), wanted))
        if shards[-1]["documents"] != plan.in_shard(number):
            (folder / shard_name(number)).unlink()
            return False
    write_text(folder / INDEX, json.dumps({"shards": shards}))
    return True


def _holds(folder: Any, documents: int) -> bool:
    """Whether there is an index of so many documents."""
    try:
        return read_index(folder, documents) is not None
    except InputError:
        return False


def summary(shard: Shard, store: str) -> dict[str, Any]:
    """What the index holds of a shard. Raises `InputError` if it is another store's."""
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


def read_index(folder: Any, documents: int) -> list[dict[str, Any]] | None:
    """The shards' summaries, in order; None while the store of `documents` is not complete."""
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
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= 1 << 40 for value in values
    )


def name_in_store(store: Any, coder: Coder, name: str = "") -> str:
    """What a feature store calls a coder, which it knows by its weights and where it begins.

    name: what it should be called there. Raises `InputError`.
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
        raise InputError(
            f"{store.folder}: holds features of {public_name(coder)} from position "
            f"{same[0]['first']} on, and the coder begins at {coder.first}; extract again"
        )
    raise InputError(
        f"{store.folder}: holds no features of {public_name(coder)}, but of "
        f"{', '.join(held['name'] for held in some)}; extract again"
    )
