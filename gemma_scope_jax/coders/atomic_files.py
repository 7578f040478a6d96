"""The files of a coder's folder, which `write_folder` writes all together or not at all."""

import json
from typing import Any, BinaryIO

from gemma_scope_jax.storage.atomic import write_folder
from gemma_scope_jax.storage.disk import disk_error
from gemma_scope_jax.storage.safetensors_writing import (
    Streamed,
    lay_out,
    write_array,
    write_safetensors,
)

__all__ = [
    "Streamed",
    "disk_error",
    "lay_out",
    "write_array",
    "write_folder",
    "write_json",
    "write_safetensors",
]


def write_json(file: BinaryIO, value: Any) -> None:
    """Write a JSON document to an open file."""
    file.write(json.dumps(value).encode())
