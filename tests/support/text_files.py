"""A few documents in every kind of file that is read."""

import gzip
import json

import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

TEXTS = [f"document {i} " + "äbc\ndef " * (i % 7) for i in range(41)]


CHAT = [
    {"role": "user", "content": "the start of turn"},
    {"role": "assistant", "content": "end of turn and the end"},
    {"role": "user", "content": "one <end_of_turn> two"},
    {"role": "model", "content": "the mask"},
]


def as_lines(texts, key="text"):
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def write_records(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write_zst(path, lines):
    """Two frames, as parallel compressors write them."""
    half = lines.index(b"\n", len(lines) // 2) + 1
    path.write_bytes(zstandard.compress(lines[:half]) + zstandard.compress(lines[half:]))


def write_corpus(folder, kind, texts=TEXTS):
    """The texts in two files of a kind; the pattern that names them."""
    for number, part in enumerate((texts[:17], texts[17:])):
        path = folder / f"{number}.{kind}"
        if kind == "txt":
            path.write_text("\n\f\n".join([*part, " \n"]))
        elif kind == "jsonl":
            path.write_bytes(as_lines(part) + b"\n")
        elif kind == "jsonl.gz":
            path.write_bytes(gzip.compress(as_lines(part)))
        elif kind == "jsonl.zst":
            write_zst(path, as_lines(part))
        elif kind == "array_record":
            write_records(path, as_lines(part).splitlines() if number else map(str.encode, part))
    return str(folder / f"*.{kind}")


KINDS = ["txt", "jsonl", "jsonl.gz", "array_record", "jsonl.zst"]
