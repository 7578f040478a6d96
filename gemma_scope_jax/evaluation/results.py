"""Results of evaluations as files that SAEBench's own tools read.

Every SAEBench evaluation writes one JSON document for each coder: an envelope,
`eval_result_metrics` with plain numbers by category, `eval_result_details` with a list of flat
records, and `eval_result_unstructured` for anything else. Ours do the same, so that results can be
compared; what we measure beyond SAEBench has other names, which its readers ignore.

Source: SAEBench 0.6 (`evals/base_eval_output.py`, `eval_output_schema_*.json`). A number that does
not exist (a loss on no tokens) is -1, as there; in `eval_result_unstructured` it is null.
"""

import json
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from typing import Any

import numpy as np
from etils import epath

from gemma_scope_jax.coders.coder import Coder, public_name
from gemma_scope_jax.storage.atomic import write_text
from gemma_scope_jax.storage.manifest import Format, digest
from gemma_scope_jax.storage.paths import folder_path
from gemma_scope_jax.storage.strict_json import field

ENVELOPE = ("eval_type_id", "eval_config", "eval_id", "datetime_epoch_millis", "sae_cfg_dict")
ENVELOPE += ("eval_result_metrics", "eval_result_details", "eval_result_unstructured")
ENVELOPE += ("sae_bench_commit_hash", "sae_lens_id", "sae_lens_release_id", "sae_lens_version")
UNDEFINED = -1  # SAEBench's number for "no number"
LOSS_TOKENS = "total_tokens_eval_reconstruction"  # in the group "token_stats"


def saebench_result(
    eval_type: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
    details: Sequence[Mapping[str, Any]],
    coder: Coder | None,
    unstructured: Any = None,
    *,
    name: str = "",
) -> dict[str, Any]:
    """The JSON document of one evaluation of one coder, plain Python data throughout.

    eval_type     "core", "absorption_first_letter", "sparse_probing", "scr", "tpp", ...
    config        how it was measured (SAEBench's `eval_config`)
    metrics       {category: {metric: number}}
    details       records of numbers and strings, such as one a feature or one a data set
    coder         what was measured; None for several coders, which `name` names
    unstructured  anything else; arrays become lists
    """
    release, ident = coder_id(coder, name)
    versions = [found.version for found in distributions(name="gemma-scope-jax")]
    return {
        "eval_type_id": eval_type,
        "eval_config": plain(config),
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": plain(metrics, UNDEFINED),
        "eval_result_details": plain(list(details), UNDEFINED),
        "sae_bench_commit_hash": f"gemma_scope_jax {versions[0] if versions else 'unknown'}",
        "sae_lens_id": ident,
        "sae_lens_release_id": release,
        "sae_lens_version": None,
        "sae_cfg_dict": None if coder is None else coder_config(coder),
        "eval_result_unstructured": plain(unstructured),
    }


def write_result(folder: str | os.PathLike, result: Mapping[str, Any]) -> epath.Path:
    """Write a document whole, at the path that SAEBench uses in a folder, which may be gs://:
    FOLDER/EVAL_TYPE/RELEASE_ID_eval_results.json. Returns the path."""
    path = result_path(
        folder, result["eval_type_id"], result["sae_lens_release_id"], result["sae_lens_id"]
    )
    write_text(path, json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return path


def read_result(path: str | os.PathLike) -> dict[str, Any]:
    """Read a document, ours or SAEBench's. Raises `InputError`."""
    return _FORMAT.read(folder_path(path))


def _check(result: dict[str, Any], path: Any) -> None:
    for key in ("eval_type_id", "sae_lens_id", "sae_lens_release_id"):
        field(result, key, str, path)
    for key in ("eval_config", "eval_result_metrics"):
        field(result, key, dict, path)
    for group in result["eval_result_metrics"]:
        for name in (numbers := field(result["eval_result_metrics"], group, dict, path)):
            field(numbers, name, float, f"{path}, {group}", default=None)


_FORMAT = Format("the result of an evaluation", {}, _check, "name the file of another", ENVELOPE)


def result_path(folder: str | os.PathLike, eval_type: str, release: str, ident: str) -> epath.Path:
    """Where `write_result` puts the document of a coder."""
    name = f"{release}_{ident}".replace(os.sep, "_").replace("/", "_").replace(":", "_")
    return folder_path(folder) / eval_type / f"{name.lstrip('_')}_eval_results.json"


def coder_id(coder: Coder | None, name: str = "") -> tuple[str, str]:
    """(release, id): the first part of an address and the rest; for a folder a digest of its path,
    which stays private, and its name."""
    if coder is None:
        return "gemma_scope_jax", name
    path = coder.info.path
    if not path:
        where = "-".join(map(str, coder.layers))
        return "gemma_scope_jax", name or f"{coder.kind}-{coder.reads}-layer-{where}"
    if os.path.isabs(path):
        return f"folder-{digest(os.fsencode(path), 4)}", public_name(coder)
    if "://" in path:
        release, _, ident = path.rstrip("/").rpartition("/")
    else:
        release, _, ident = path.partition("/")
    return (release, ident) if ident else ("gemma_scope_jax", release)


def coder_config(coder: Coder) -> dict[str, Any]:
    """SAEBench's `sae_cfg_dict` of a coder: its sizes and place, some under SAELens' names."""
    info = coder.info
    name = "jumprelu" if coder.k is None else "topk"
    return {
        "architecture": name if coder.kind == "sae" else f"{name}_{coder.kind}",
        **({} if coder.k is None else {"k": coder.k}),
        "d_in": int(coder.d_in),
        "d_sae": int(coder.width) * len(coder.layers),
        "d_out": int(coder.d_out),
        "model_name": info.model_name,
        "hook_layer": coder.layers[0],
        "hook_name": coder.reads,
        "layers": list(coder.layers),
        "reads": coder.reads,
        "writes": coder.writes,
        "kind": coder.kind,
        "affine": coder.w_skip is not None,
        "first": coder.first,
        "target_l0": None if info.l0 is None else float(info.l0),
        "path": public_name(coder),
    }


def plain(value: Any, undefined: Any = None) -> Any:
    """`value` as plain JSON data: arrays as lists, numbers that are not finite as `undefined`."""
    if isinstance(value, Mapping):
        return {str(k): plain(v, undefined) for k, v in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Sequence):
        return [plain(v, undefined) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else undefined
    if hasattr(value, "dtype"):  # an array or a scalar of numpy or jax
        return plain(np.asarray(value).tolist(), undefined)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a {type(value).__name__} has no place in a JSON document")
