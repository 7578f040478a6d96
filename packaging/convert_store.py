"""A feature store of version 1, whose shards were files of our own, as one of Parquet files.

    python packaging/convert_store.py OLD NEW

NEW is a new local folder. What is in it is what `extract` would write now, bit for bit but for the
versions in the manifest; an unfinished store stays one, and `extract` goes on with it.
"""

import json
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction import manifest as manifests
from gemma_scope_jax.extraction.store.codec import Entries, offsets_of
from gemma_scope_jax.extraction.store.shards import Shard, ShardWriter

MAGIC = b"GSJFEAT1"


class OldShard:
    """magic | blocks ... | footer, zlib JSON | its bytes, its crc32, uint32 each | magic"""

    def __init__(self, path: Path):
        self.path, self.data = path, path.read_bytes()
        size, crc = (int.from_bytes(self.data[-16 + i :][:4], "little") for i in (0, 4))
        footer = self.data[-16 - size : -16]
        if self.data[-8:] != MAGIC or zlib.crc32(footer) != crc:
            raise InputError(f"{path}: damaged (its footer)")
        self.footer = json.loads(zlib.decompress(footer))

    def block(self, segment: dict, name: str) -> np.ndarray:
        """An array: all first bytes before all second ones, each plane deflated or not."""
        at, length, crc, dtype = segment["blocks"][name]
        data = self.data[at : at + length]
        if zlib.crc32(data) != crc:
            raise InputError(f"{self.path}: damaged (block {name}, byte {at} on)")
        planes, at = [], 0
        for _ in range(np.dtype(dtype).itemsize):
            size, plain = divmod(int.from_bytes(data[at : at + 4], "little"), 2)
            part = data[at + 4 : at + 4 + size]
            planes.append(np.frombuffer(part if plain else zlib.decompress(part), np.uint8))
            at += 4 + size
        return np.ascontiguousarray(np.stack(planes).T).reshape(-1).view(dtype)

    def entries(self, segment: dict, c: int) -> Entries:
        """A list's activations by token; ids are kept as differences, float16 values scaled."""
        about = segment["coders"][c]
        offsets = offsets_of(self.block(segment, f"{c}.count"))
        ids, values, start = [], [], 0
        for part, stop in enumerate(about["token_parts"]):
            some = offsets[start : stop + 1] - offsets[start]
            sums = offsets_of(self.block(segment, f"{c}.feature.{part}"))
            ids.append(sums[1:] - np.repeat(sums[some[:-1]], np.diff(some)))
            held = self.block(segment, f"{c}.value.{part}").astype(np.float32)
            values.append(np.ldexp(held, about["exponent"]))
            start = stop
        return Entries(offsets, np.concatenate(ids).astype(np.int32), np.concatenate(values))

    def rows(self, segment: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a `ShardWriter` is given of tokens: tokens, which count, pieces."""
        tokens = self.block(segment, "tokens")
        counted = np.unpackbits(self.block(segment, "counted"))[: len(tokens)].astype(bool)
        numbers = np.array([number for number, _, _ in self.footer["documents"]], np.int64)
        documents, offsets, lengths = (
            self.block(segment, f"piece_{name}") for name in ("documents", "offsets", "lengths")
        )
        return tokens, counted, np.stack([numbers[documents], offsets, lengths], 1)


def convert(old: Path, new: Path) -> None:
    """Raises `InputError` for what is no store of version 1, and for a damaged one."""
    manifest = json.loads((old / manifests.MANIFEST).read_text())
    if (manifest.get("format"), manifest.get("version")) != (manifests.FORMAT["format"], 1):
        raise InputError(f"{old}: holds no feature store of version 1")
    new.mkdir(parents=True)
    manifest["version"] = manifests.FORMAT["version"]
    for was, name in (("rows", "batch_size"), ("length", "context_size")):
        manifest["data"][name] = manifest["data"].pop(was)
    lists, store = manifests.lists(manifest), manifests.store_digest(manifest)
    shards = []
    with ThreadPoolExecutor() as pool:
        for path in sorted(old.glob("shard-*.features")):
            shard = OldShard(path)
            number, documents = shard.footer["shard"], shard.footer["documents"]
            with ShardWriter(new, number, lists, manifest["values"], pool) as writer:
                for segment in shard.footer["segments"]:
                    entries = [shard.entries(segment, c) for c in range(len(lists))]
                    writer.add(*shard.rows(segment), entries)
                writer.close(store=store, documents=documents)
            shards.append(manifests.summary(Shard(new, number), store))
    (new / manifests.MANIFEST).write_text(json.dumps(manifest, indent=1))
    if (old / manifests.INDEX).exists():
        (new / manifests.INDEX).write_text(json.dumps({"shards": shards}))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except (InputError, OSError) as error:
        sys.exit(str(error))
