"""The keys of SAELens' cfg.json: consulted, known to change nothing, or refused by name.

Ignoring an unknown key could turn a coder into another function. Source: sae-lens 6.54
(`saes/sae.py`, `saes/topk_sae.py`), and the flat configs of versions 2 to 5.
"""

from collections.abc import Mapping
from typing import Any

from gemma_scope_jax.coders.interop.hooks import unknown_key
from gemma_scope_jax.errors import InputError

# What decides the function; `interop.saelens` consults all of these.
FUNCTION = {
    "architecture", "activation_fn", "activation_fn_str", "activation_fn_kwargs", "k",
    "apply_b_dec_to_input", "normalize_activations", "reshape_activations",
    "rescale_acts_by_decoder_norm", "finetuning_scaling_factor", "d_in", "d_sae", "d_out",
}  # fmt: skip
# Where the coder acts, consulted, too; version 6 has these keys in `metadata`.
PLACE = {
    "model_name", "hook_name", "hook_point", "hf_hook_name", "hook_name_out", "hf_hook_name_out",
    "hook_head_index", "hook_point_head_index", "seqpos_slice", "model_from_pretrained_kwargs",
}  # fmt: skip
HARMLESS = {  # reason: keys
    "the weights say which they have": ("dtype",),
    "where and with what SAELens ran": (
        "device", "act_store_device", "sae_lens_version", "sae_lens_training_version", "seed",
        "model_class_name", "autocast", "autocast_lm", "compile_llm", "compile_sae", "verbose",
        "llm_compilation_mode", "sae_compilation_mode", "n_devices",
    ),
    "the hook's name says the layer": ("hook_layer", "hook_layer_out", "hook_point_layer"),
    "what it was trained on, and for how long": (
        "dataset_path", "dataset_trust_remote_code", "streaming", "is_dataset_tokenized",
        "context_size", "prepend_bos", "exclude_special_tokens", "disable_concat_sequences",
        "sequence_separator_token", "training_tokens", "n_batches_in_buffer", "store_batch_size",
        "store_batch_size_prompts", "train_batch_size", "train_batch_size_tokens",
        "use_cached_activations", "cached_activations_path", "activations_mixing_fraction",
        "tokens_per_buffer", "total_training_tokens", "total_training_steps",
    ),
    "how it was trained": (
        "l1_coefficient", "l1_warm_up_steps", "l0_coefficient", "l0_warm_up_steps", "lp_norm",
        "target_l0", "lr", "lr_end", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps",
        "n_restart_cycles", "adam_beta1", "adam_beta2", "use_ghost_grads", "mse_loss_normalization",
        "noise", "noise_alpha", "noise_scale", "expansion_factor", "b_dec_init_method",
        "decoder_init_norm", "decoder_orthogonal_init", "decoder_heuristic_init",
        "decoder_heuristic_init_norm", "init_encoder_as_decoder_transpose", "normalize_sae_decoder",
        "scale_sparsity_penalty_by_decoder_norm", "jumprelu_init_threshold", "jumprelu_bandwidth",
        "jumprelu_tanh_scale", "jumprelu_sparsity_loss_mode", "jumprelu_ste_to_input",
        "pre_act_loss_coefficient", "aux_loss_coefficient", "topk_threshold_lr",
        "use_sparse_activations", "feature_sampling_window", "dead_feature_window",
        "dead_feature_threshold", "finetuning_method", "finetuning_tokens",
        "sparsity_loss_coefficient", "sparsity_loss_warm_up_steps", "from_pretrained_path",
    ),
    "where it is published, logged and saved": (
        "neuronpedia_id", "sae_set", "release", "sae_id", "run_name", "wandb_project", "wandb_id",
        "wandb_entity", "wandb_log_frequency", "log_to_wandb", "eval_every_n_wandb_logs", "logger",
        "checkpoint_path", "n_checkpoints", "n_eval_batches", "eval_batch_size_prompts",
        "output_path", "hf_repo_id", "save_final_checkpoint", "resume",
    ),
}  # fmt: skip
_KNOWN = FUNCTION | PLACE | {key for keys in HARMLESS.values() for key in keys} | {"metadata"}


def check_keys(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Raise `InputError` for a key that is neither consulted nor known to change nothing.

    SAELens computes nothing from `metadata`, so any key may stand there, except for one that
    decides the function, or that contradicts the same key outside.
    """
    for key, value in config.items():
        if key not in _KNOWN:
            raise unknown_key(key, value, _KNOWN)
    for key in sorted((FUNCTION | PLACE) & set(metadata)):
        if key in config and config[key] != metadata[key]:
            given = f"{config[key]!r:.40}, but {metadata[key]!r:.40} in metadata"
            raise InputError(f"{key} is {given}: keep one")
        if key in FUNCTION and key not in config and metadata[key] is not None:
            raise InputError(f"{key} is in metadata, where SAELens does not read it: move it out")
    for key in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(config.get(key), bool | None):
            raise InputError(f"{key} is {config[key]!r:.40}, not true or false")
    arguments = config.get("activation_fn_kwargs")
    if arguments is not None and not (isinstance(arguments, dict) and set(arguments) <= {"k"}):
        raise InputError(f"activation_fn_kwargs is {arguments!r:.60}, only k is supported")
    for of in (config, metadata):
        loaded = of.get("model_from_pretrained_kwargs")
        if isinstance(loaded, dict) and loaded.get("center_writing_weights"):
            key = "center_writing_weights in model_from_pretrained_kwargs"
            raise InputError(f"{key} changes the activations: the coder does not fit the model")
