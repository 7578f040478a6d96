"""What each of a feature store's columns takes as Parquet: bytes and CPU time by encoding.

    .venv/bin/python benchmarks/trials/store_columns.py STORE

STORE is a folder that `gemma-scope extract` has made. CPU seconds are the process's, of one thread,
a million tokens; medians of 3, in turns.
"""

import io
import itertools
import statistics
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import gemma_scope_jax as gs
from gemma_scope_jax.extraction.store.codec import kept_values


def parquet(array: np.ndarray, encoding: str, codec: str, level: int | None):
    table = pa.table({"x": pa.array(array)})
    options = {"use_dictionary": encoding == "DICTIONARY"}
    if encoding != "DICTIONARY":
        options["column_encoding"] = {"x": encoding}

    def write() -> bytes:
        file = io.BytesIO()
        pq.write_table(
            table,
            file,
            compression=codec,
            compression_level=level,
            write_page_checksum=True,
            write_statistics=False,
            **options,
        )
        return file.getvalue()

    def read(data: bytes) -> None:
        pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read(use_threads=False)

    return write, read


def main() -> None:
    store = gs.FeatureStore(sys.argv[1])
    segment = store.segment(0)
    n, entries, index = len(segment), segment.by_token(), segment.by_feature()
    width = store.width()
    scale = np.float32(2.0 ** (15 - np.frexp(entries.values.max())[1]))
    halves, index_halves = ((x.values * scale).astype(np.float16) for x in (entries, index))
    print(f"{n:,} tokens, {len(entries.ids) / n:.1f} features each, width {width}\n")
    small = np.uint16 if width <= 1 << 16 else np.int32
    columns = {
        "features by token": {"int32": entries.ids, "uint16": entries.ids.astype(small)},
        "values by token": {
            "float32 of 11 bits": kept_values(entries.values, "float16"),
            "float16, scaled": halves,
        },
        "tokens by feature": {"int32": index.ids},
        "values by feature": {
            "float32 of 11 bits": kept_values(index.values, "float16"),
            "float16, scaled": index_halves,
        },
        "token of each entry": {
            "int32": np.repeat(np.arange(n, dtype=np.int32), np.diff(entries.offsets))
        },
        "feature of each entry": {
            "int32": np.repeat(np.arange(width, dtype=np.int32), np.diff(index.offsets))
        },
    }
    codecs = [
        ("none", None),
        ("lz4", None),
        ("snappy", None),
        ("zstd", -5),
        ("zstd", 1),
        ("zstd", 3),
    ]
    print("| column | kept as | encoding | compression | bytes a token | write | read |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, kinds in columns.items():
        work = {}
        for (kind, array), (codec, level) in itertools.product(kinds.items(), codecs):
            whole = array.dtype.kind in "iu"
            encodings = ["PLAIN", "DICTIONARY", "BYTE_STREAM_SPLIT"]
            encodings += ["DELTA_BINARY_PACKED"] * (array.dtype == np.int32)
            for encoding in encodings:
                if array.dtype == np.uint16 and encoding == "BYTE_STREAM_SPLIT":
                    continue  # Parquet's integers are of 4 bytes at least
                if name.endswith("entry") and encoding not in ("DICTIONARY", "DELTA_BINARY_PACKED"):
                    continue
                if not whole and encoding in ("DICTIONARY", "PLAIN") and codec != "zstd":
                    continue
                label = codec if level is None else f"{codec} {level}"
                work[kind, encoding, label] = parquet(array, encoding, codec, level)
        times = {key: ([], []) for key in work}
        sizes = {}
        for _ in range(3):
            for key, (write, read) in work.items():
                start = time.process_time()
                data = write()
                middle = time.process_time()
                read(data)
                times[key][0].append(middle - start)
                times[key][1].append(time.process_time() - middle)
                sizes[key] = len(data)
        for key in sorted(work, key=sizes.get):
            writing, reading = (1e6 / n * statistics.median(t) for t in times[key])
            what = " | ".join([name, *key])
            print(f"| {what} | {sizes[key] / n:.1f} | {writing:.2f} | {reading:.2f} |")


if __name__ == "__main__":
    main()
