"""Layouts of a feature store as Parquet, whole: bytes, CPU time to write, to read by token, to read
one feature.

    .venv/bin/python benchmarks/trials/store_layouts.py STORE

STORE is a folder that `gemma-scope extract` has made; its first two segments are taken. CPU
seconds are the process's, with one thread, medians of 5, in turns.
"""

import io
import statistics
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import gemma_scope_jax as gs
from gemma_scope_jax.extraction.store.codec import Entries, kept_values, turned

WIDTH, FEATURES = 4096, (7, 1234, 3000, 4000)
DELTA, SPLIT = "DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT"


def kept(entries: Entries) -> Entries:
    return entries._replace(values=kept_values(entries.values, "float16"))


def save(columns: dict, encodings: dict, rows: int, level: int) -> bytes:
    file = io.BytesIO()
    pq.write_table(
        pa.table(columns),
        file,
        row_group_size=rows,
        use_dictionary=False,
        column_encoding=encodings,
        compression="zstd",
        compression_level=level,
        write_page_checksum=True,
        write_statistics=["feature"] if "feature" in columns else False,
    )
    return file.getvalue()


def opened(data: bytes) -> pq.ParquetFile:
    return pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)


class LongByFeature:
    """feature, token, value, sorted by feature."""

    def __init__(self, rows: int, level: int):
        self.rows, self.level = rows, level

    def write(self, entries: Entries):
        index = turned(kept(entries), WIDTH)
        counts = np.diff(index.offsets)
        features = np.repeat(np.arange(WIDTH, dtype=np.int32), counts)
        columns = {"feature": features, "row": index.ids, "value": index.values}
        encodings = {"feature": DELTA, "row": DELTA, "value": SPLIT}
        return save(columns, encodings, self.rows, self.level)

    def entries(self, data: bytes, groups=None) -> Entries:
        file = opened(data)
        groups = range(file.num_row_groups) if groups is None else groups
        table = file.read_row_groups(groups, use_threads=False)
        feature, row, value = (table[c].to_numpy() for c in ("feature", "row", "value"))
        return Entries(np.searchsorted(feature, np.arange(WIDTH + 1)), row, value)

    def tokens(self, data, n):
        return turned(self.entries(data), n)

    def feature(self, data, feature: int):
        meta, groups = opened(data).metadata, []
        for g in range(meta.num_row_groups):
            found = meta.row_group(g).column(0).statistics
            if found.min <= feature <= found.max:
                groups.append(g)
        index = self.entries(data, groups)
        some = slice(index.offsets[feature], index.offsets[feature + 1])
        return index.ids[some], index.values[some]


class LongByToken(LongByFeature):
    """row, feature, value, sorted by token: one copy; a feature is a scan."""

    def write(self, entries: Entries):
        tokens = np.arange(len(entries.offsets) - 1, dtype=np.int32)
        rows = np.repeat(tokens, np.diff(entries.offsets))
        columns = {"row": rows, "feature": entries.ids, "value": kept(entries).values}
        encodings = {"row": DELTA, "feature": SPLIT, "value": SPLIT}
        return save(columns, encodings, self.rows, self.level)

    def tokens(self, data, n):
        table = opened(data).read(use_threads=False)
        row, feature, value = (table[c].to_numpy() for c in ("row", "feature", "value"))
        return Entries(np.searchsorted(row, np.arange(n + 1)), feature, value)

    def feature(self, data, feature: int):
        table = opened(data).read(use_threads=False)
        some = table["feature"].to_numpy() == feature
        return table["row"].to_numpy()[some], table["value"].to_numpy()[some]


class Lists(LongByFeature):
    """A row a token with lists of features and values, and a row a feature with lists of tokens
    and values: two copies."""

    def write(self, entries: Entries):
        entries = kept(entries)
        return [
            self._lists(entries, SPLIT, self.rows),
            self._lists(turned(entries, WIDTH), DELTA, 512),
        ]

    def _lists(self, entries: Entries, encoding: str, rows: int) -> bytes:
        ends = pa.array(entries.offsets.astype(np.int32))
        ids, values = (pa.ListArray.from_arrays(ends, pa.array(x)) for x in entries[1:])
        encodings = {"ids.list.element": encoding, "values.list.element": SPLIT}
        return save({"ids": ids, "values": values}, encodings, rows, self.level)

    def _read(self, data: bytes, groups=None) -> Entries:
        file = opened(data)
        groups = range(file.num_row_groups) if groups is None else groups
        table = file.read_row_groups(groups, use_threads=False).combine_chunks()
        ids, values = (table[c].chunk(0) for c in ("ids", "values"))
        return Entries(ids.offsets.to_numpy(), ids.values.to_numpy(), values.values.to_numpy())

    def tokens(self, data, n):
        return self._read(data[0])

    def feature(self, data, feature: int):
        index, at = self._read(data[1], [feature // 512]), feature % 512
        some = slice(index.offsets[at], index.offsets[at + 1])
        return index.ids[some], index.values[some]


def main() -> None:
    store = gs.FeatureStore(sys.argv[1])
    segments = [store.segment(i) for i in range(2)]
    texts = [segment.by_token() for segment in segments]
    n = sum(map(len, segments))
    parquet = {
        "long by token": LongByToken(1 << 18, 1),
        "long by feature": LongByFeature(1 << 18, 1),
        "long by feature, level 3": LongByFeature(1 << 18, 3),
        "long by feature, groups of 65,536": LongByFeature(1 << 16, 1),
        "long by feature, groups of a million": LongByFeature(1 << 20, 1),
        "lists by token and by feature": Lists(1 << 12, 1),
        "lists by token and by feature, level 3": Lists(1 << 12, 3),
    }
    work = {name: (x, [x.write(t) for t in texts]) for name, x in parquet.items()}
    times = {name: ([], [], []) for name in work}
    sizes = {}
    for layout, data in work.values():
        for segment, some, t in zip(segments, data, texts):
            assert all(map(np.array_equal, layout.tokens(some, len(segment)), t))
            for f in FEATURES:
                wanted = segment.features(f, f + 1)[1:]
                assert all(map(np.array_equal, layout.feature(some, f), wanted))
    for _ in range(5):
        for name, (layout, data) in work.items():
            start = time.process_time()
            written = [layout.write(t) for t in texts]
            times[name][0].append(1e6 / n * (time.process_time() - start))
            parts = [p for w in written for p in (w if isinstance(w, list) else [w])]
            sizes[name] = sum(map(len, parts)) / n
            start = time.process_time()
            for some, segment in zip(data, segments):
                layout.tokens(some, len(segment))
            times[name][1].append(1e6 / n * (time.process_time() - start))
            start = time.process_time()
            for f in FEATURES:
                for some in data:
                    layout.feature(some, f)
            each = (time.process_time() - start) / len(FEATURES) / len(segments)
            times[name][2].append(1e3 * each)
    print("| layout | bytes a token | write, s | read by token, s | one feature, ms a segment |")
    print("| --- | --- | --- | --- | --- |")
    for name, found in times.items():
        write, read, one = map(statistics.median, found)
        print(f"| {name} | {sizes[name]:.1f} | {write:.2f} | {read:.2f} | {one:.1f} |")


if __name__ == "__main__":
    main()
