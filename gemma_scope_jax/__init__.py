"""Gemma Scope 2 as a system, in JAX: docs/architecture.md is the map of the rooms.

Everything public can be imported from here, and every command is written over it. Names resolve on
first use, so that importing the package is fast. Rooms are nouns and public names verbs, so that
none hides the other.
"""

import importlib
from typing import Any

_PUBLIC = {
    "errors": ["InputError"],
    "progress": ["Progress", "on_progress", "quiet"],
    "storage.paths": ["check_writable", "folder_path", "use_compilation_cache"],
    "storage.atomic": ["write_text"],
    "storage.strict_json": ["finite", "legible", "parse_json"],
    "model.config": ["GemmaConfig", "Model", "PRESETS", "Params", "init_params", "preset"],
    "model.batch": ["TokenBatch", "TokenLabels", "tokens"],
    "model.gemma": ["Cache", "Output", "forward", "init_cache"],
    "model.run": ["run"],
    "model.recompilation": ["RecompilationWarning"],
    "model.intercept": [
        "Intercept",
        "SITES",
        "capture",
        "fold",
        "freeze",
        "patch",
        "per_layer",
        "read",
        "steer",
        "tokenwise",
        "write",
    ],
    "model.generate": ["generate"],
    "model.processes": ["Processes", "abandon", "is_first_process", "join_processes"],
    "model.sharding": ["make_mesh", "param_shardings", "shard_batch"],
    "model.tokenizer": ["Tokenizer", "fit_tokenizer", "load_tokenizer"],
    "model.checkpoints.load": ["load_model", "model_config"],
    "coders.coder": ["Coder", "as_jump_relu", "check_fits", "encode", "public_name"],
    "coders.sparse_coder": ["SparseCoder"],
    "coders.multi_layer_coder": ["MultiLayerCoder"],
    "coders.coder_set": ["CoderSet"],
    "coders.splice": ["clamp", "edit", "features", "replacement", "splice"],
    "coders.load": ["decoder_rows", "load_coder", "load_coders", "load_decoder"],
    "coders.opened": ["OpenedCoders", "open_coders", "open_model"],
    "coders.release.files": ["save_coder"],
    "coders.interop.circuit_tracer": ["save_circuit_tracer"],
    "coders.interop.saelens": ["save_saelens"],
    "coders.release.catalog": ["addresses"],
    "coders.listing": ["address_table", "describe_address", "find_addresses"],
    "data.chats": ["chat_prompt", "read_chat"],
    "data.documents": ["TextData", "read_documents", "sample_documents"],
    "data.document_files": ["decoded", "read_text", "text_files"],
    "training.recipe": ["CoderConfig", "LossConfig", "OptimizerConfig", "TrainConfig"],
    "training.config_file": ["field_table", "load_config", "override"],
    "training.estimate": ["TrainEstimate", "plan_training"],
    "training.train": ["store_activations", "train"],
    "extraction.estimate": ["plan_extraction"],
    "extraction.extract": ["check_extraction", "extract"],
    "extraction.export": ["export_store"],
    "extraction.manifest": ["ExtractionSettings", "name_in_store"],
    "extraction.store.store": ["FeatureStore"],
    "evaluation.check": ["CheckReport", "check_coder"],
    "evaluation.core_run": ["check_evaluation", "evaluate_coders"],
    "evaluation.evaluate": ["evaluate", "text_batches"],
    "evaluation.report": ["core_doubts", "core_tables"],
    "evaluation.texts": ["EvaluationText"],
    "circuits.estimate": ["AttributionEstimate", "plan_attribution"],
    "circuits.graph": ["Graph", "GraphScores", "Nodes", "check_thresholds"],
    "circuits.load": ["load_graph"],
    "circuits.strongest": ["StrongestNodes"],
    "circuits.compare": ["GraphDifference", "graph_difference"],
    "circuits.aggregate": ["GraphAggregate", "aggregate_graphs"],
    "circuits.neurons": ["mlp_neurons"],
    "circuits.overlap": ["GraphOverlap", "graph_overlap"],
    "circuits.subgraph": ["subgraph", "subgraph_scores"],
    "circuits.supernodes": ["Supernode", "Supernodes", "find_supernodes"],
    "circuits.heads": [
        "EdgeHeads",
        "LayerHeads",
        "edge_heads",
        "edge_heads_at",
        "head_flows",
        "link_heads",
    ],
    "circuits.head_scores": ["HeadScore", "head_score"],
    "circuits.export": ["export_graph", "graph_document", "node_ids"],
    "probing.benchmark": ["benchmark", "benchmark_tables"],
    "autointerp.examples": ["Sampling"],
    "autointerp.explain": ["explain_features"],
    "autointerp.explanations": [
        "SCORE_FIGURES",
        "explained_folder",
        "is_number",
        "read_explanations",
    ],
    "autointerp.job": ["ExplanationJob", "check_explanation", "open_explanation_job", "open_judge"],
    "autointerp.judges.endpoint": ["Endpoint"],
    "circuits.attribute": ["AttributionSettings", "attribute", "check_attribution"],
    "circuits.page": ["graph_page"],
    "circuits.report": ["GraphReport", "report_graph"],
    "circuits.targets": ["Target"],
    "circuits.words": [
        "FeatureDetails",
        "feature_details",
        "features_of",
        "label_graph",
        "node_name",
        "strongest_paths",
    ],
    "circuits.intervene": ["Intervened", "intervene"],
    "circuits.interventions": ["Intervention", "edit_features"],
    "circuits.validate": ["Agreement", "Validation"],
    "cards.build": ["build_cards", "store_dtype"],
    "cards.card_files": ["FeatureCards"],
    "cards.examples": ["CardSettings"],
    "cards.known": ["KnownFeatures", "read_known"],
    "cards.labels": ["read_labels"],
    "cards.site": ["build_site"],
    "cards.sites": ["build_card_sites", "plan_card_sites"],
    "behaviour.audit": ["AuditSettings", "audit", "check_audit"],
    "behaviour.judges": ["Judge", "agreement", "answer_judge"],
    "behaviour.measure": ["continuation_logprobs", "generated", "text_loss"],
    "behaviour.results": ["Audit"],
    "behaviour.suites.suite": ["Suite", "load_suite", "suite_items", "suite_names"],
    "inspection.inspect_text": ["check_text", "inspect_text"],
    "inspection.page": ["inspection_page"],
    "inspection.terminal": ["inspection_tables"],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
