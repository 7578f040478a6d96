"""Exports cards as the folder tree of Neuronpedia's bulk import.

    MODEL/LAYER-SET/{release,model,sourceset,source}.jsonl
    MODEL/LAYER-SET/features/batch-N.jsonl.gz, activations/batch-N.jsonl.gz
    MODEL/LAYER-SET/explanations/batch-N.jsonl.gz      if there are any

Creator, release and links are left to the importer: empty, or placeholders.

Source: sae-dashboard, neuronpedia/neuronpedia_export.py, and the rows of neuronpedia's own tables.
"""

import datetime
import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_scope_jax.autointerp.explanations import SCORE_FIGURES, Explanation, is_number
from gemma_scope_jax.cards.card_files import FeatureCards
from gemma_scope_jax.cards.export.saedashboard import TEXT_FACTS, batch_facts, batches, rounded
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.release.config import instruction_tuned
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.storage.atomic import new_folder

CREATOR, STRENGTH = "gemma-scope-jax", 10
# The keys of a dashboard that a feature's row does not have.
DASHBOARD = {"feature_index", "activations", "vector", *TEXT_FACTS}


def export_neuronpedia(
    cards: FeatureCards,
    coder: Coder,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    heads: int | None = None,
    explanations: Mapping[int, Explanation] | None = None,
) -> None:
    """Write `folder`/MODEL/LAYER-SET; see `export_saedashboard` for `heads`."""
    explanations = explanations or {}
    facts, now = batch_facts(cards), datetime.datetime.now(datetime.UTC).isoformat()
    source = f"{facts['layer']}-{facts['sae_set']}"
    place = {"modelId": facts["model_id"], "layer": source, "creatorId": CREATOR, "createdAt": now}
    with new_folder(folder / facts["model_id"] / source, "source.jsonl") as new:
        for name, row in _about(cards, source, now).items():
            (new / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        for number, (batch, features) in enumerate(batches(cards, coder, tokenizer, heads)):
            tables = {
                "features": [_feature(cards, f, place, coder) for f in features],
                "activations": [a for f in features for a in _activations(f, place)],
                "explanations": [
                    _explanation(f, explanations[f], place) for f in batch if f in explanations
                ],
            }
            for table, rows in tables.items():
                if rows:
                    _write(new / table / f"batch-{number}.jsonl.gz", rows)


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress("".join(lines).encode(), 5, mtime=0))


def _about(cards: FeatureCards, source: str, now: str) -> dict[str, dict[str, Any]]:
    """The rows of the release, the model, the set and the source."""
    m, facts = cards.manifest, batch_facts(cards)
    model, name = facts["model_id"], facts["sae_set"]
    by = {"creatorId": CREATOR, "createdAt": now}
    title, hub = f"{m['coder']}", {"hfRepoId": None, "hfFolderId": None}
    if title.startswith("gemma-scope-2-"):  # an address of the release
        repo, _, folder = title.partition("/")
        hub = {"hfRepoId": f"google/{repo}", "hfFolderId": folder}
    return {
        "release": {
            "name": name, "description": title, "descriptionShort": title, "creatorName": CREATOR,
            "creatorNameShort": CREATOR, "visibility": "PUBLIC", "isNewUi": False,
            "featured": False, "urls": [], "creatorEmail": None, "defaultSourceSetName": None,
            "defaultSourceId": None, "defaultUmapSourceIds": [], **by,
        },
        "model": {
            "id": model, "instruct": instruction_tuned(model), "displayNameShort": model,
            "displayName": model, "tlensId": None, "dimension": None, "visibility": "PUBLIC",
            "defaultSourceSetName": None, "defaultSourceId": None, "inferenceEnabled": False,
            "layers": 0, "neuronsPerLayer": 0, "owner": "", "updatedAt": now, "website": None, **by,
        },
        "sourceset": {
            "modelId": model, "name": name, "hasDashboards": True, "visibility": "PUBLIC",
            "description": title, "type": m["kind"], "creatorName": CREATOR, "urls": [],
            "creatorEmail": None, "releaseName": name, "defaultOfModelId": None, "defaultRange": 1,
            "defaultShowBreaks": True, "showDfa": False,
            "showCorrelated": "correlated_ids" in cards, "showHeadAttribution": False,
            "showUmap": False, **by,
        },
        "source": {
            "id": source, "modelId": model, "setName": name, "hasDashboards": True,
            "inferenceEnabled": False, "inferenceHosts": [], "saelensConfig": None,
            "saelensRelease": None, "saelensSaeId": None, **hub,
            "visibility": "PUBLIC", "defaultOfModelId": None, "hasUmap": False,
            "hasUmapLogSparsity": False, "hasUmapClusters": False,
            "num_prompts": m["prompts"], "num_tokens_in_prompt": m["prompt_tokens"],
            "dataset": m["text"],
            "notes": f"{m['kind']} of {m['reads']}, layer {m['layer']}", **by,
        },
    }  # fmt: skip


def _feature(
    cards: FeatureCards, feature: dict[str, Any], place: Mapping[str, Any], coder: Coder
) -> dict[str, Any]:
    f = feature["feature_index"]
    near = cards.listed("neighbour", f, "cosines")
    return {
        **place, "index": str(f), "sourceSetName": batch_facts(cards)["sae_set"],
        "maxActApprox": round(float(cards["largest"][f]), 5), "hasVector": False, "vector": [],
        "vectorLabel": None, "vectorDefaultSteerStrength": STRENGTH,
        "hookName": f"blocks.{cards.manifest['layer']}.{coder.writes}",
        "topkCosSimIndices": [i for i, _ in near],
        "topkCosSimValues": rounded([c for _, c in near]),
        **{key: value for key, value in feature.items() if key not in DASHBOARD},
    }  # fmt: skip


def row_id(table: str, place: Mapping[str, Any], feature: int, number: int = 0) -> str:
    """An id of 25 letters and digits, like a cuid, that depends only on the row: 120 bits of a
    digest of its whole name, as a truncated name may be that of another coder's row."""
    name = json.dumps([table, place["modelId"], place["layer"], feature, number])
    left = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=15).digest())
    digits = np.base_repr(left, 36).lower().zfill(24)  # 36^24 is above 2^120
    return f"c{digits[::-1]}"


def _activations(feature: dict[str, Any], place: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows, f = [], feature["feature_index"]
    for number, a in enumerate(feature["activations"]):
        values = a["values"]
        rows.append(
            {
                **place, "id": row_id("activations", place, f, number), "index": str(f),
                "tokens": a["tokens"], "values": values, "maxValue": max(values),
                "maxValueTokenIndex": values.index(max(values)), "minValue": min(values),
                "dataSource": None, "dataIndex": None, "dfaValues": [], "dfaTargetIndex": None,
                "dfaMaxValue": None, "lossValues": [], "logitContributions": None,
                "binMin": a["bin_min"], "binMax": a["bin_max"], "binContains": a["bin_contains"],
                "qualifyingTokenIndex": a["qualifying_token_index"], "zIndices": None,
                "zValues": None,
            }
        )  # fmt: skip
    return rows


def _explanation(f: int, explanation: Explanation, place: Mapping[str, Any]) -> dict[str, Any]:
    figures = (explanation["scores"].get(n, {}).get(figure) for n, figure in SCORE_FIGURES.items())
    score = next(filter(is_number, figures), None)
    return {
        "id": row_id("explanations", place, f),
        "modelId": place["modelId"], "layer": place["layer"],
        "index": str(f), "description": explanation["text"], "authorId": place["creatorId"],
        "scoreV1": score, "typeName": explanation["method"],
        "explanationModelName": explanation["model"],
        "notes": None, "createdAt": place["createdAt"],
    }  # fmt: skip
