"""The other libraries of train_quality.py, each trained by its own trainer; runs in `.venv-peers`.

A method gives `update(step, x)` on a batch and what has to be kept for a run to go on. A finished
coder is saved as its library saves it and loaded as its library loads it, and left as plain arrays.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

SAVE_EVERY = 120.0  # seconds


@dataclasses.dataclass
class Run:
    """One run of a method, as given by the command line."""

    method: str
    width: int
    l0: int
    tokens: int
    batch: int
    rate: float
    seed: int
    scale: float  # root-mean-square norm of the activations
    D: int
    folder: Path

    @property
    def steps(self) -> int:
        return self.tokens // self.batch

    @property
    def prefixes(self) -> list[int]:
        return [self.width // 16, self.width // 4]


@dataclasses.dataclass
class Method:
    """A coder in training: `scale` divides activations, `kept` is what a run continues from."""

    update: Callable[[int, torch.Tensor], Any]
    scale: float
    kept: dict[str, Any]  # objects with a state_dict
    fields: list[tuple[Any, str]]  # (object, name of an attribute)
    save: Callable[[Path], None]
    load: Callable[[Path], dict[str, torch.Tensor]]

    def write(self, file: Path, done: int, seconds: tuple[float, float]) -> None:
        state = {k: v.state_dict() for k, v in self.kept.items()}
        fields = [getattr(owner, name) for owner, name in self.fields]
        unfinished = file.with_suffix(".new")
        torch.save({"state": state, "fields": fields, "done": done, "seconds": seconds}, unfinished)
        unfinished.replace(file)

    def read(self, file: Path) -> tuple[int, tuple[float, float]]:
        if not file.exists():
            return 0, (0.0, 0.0)
        found = torch.load(file, weights_only=False)
        for k, v in self.kept.items():
            v.load_state_dict(found["state"][k])
        for (owner, name), value in zip(self.fields, found["fields"], strict=True):
            setattr(owner, name, value)
        return found["done"], found["seconds"]


def saelens(run: Run) -> Method:
    """SAELens' trainer; inputs have the norm that its `expected_average_only_in` gives them.

    JumpReLU has the settings that its documentation recommends for the quadratic and tanh losses;
    the rates of all methods are chosen by validation, and fall over the last quarter.
    """
    from sae_lens import SAE
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes import batchtopk_sae, jumprelu_sae, matryoshka_batchtopk_sae, topk_sae
    from sae_lens.training.sae_trainer import SAETrainer

    shape = {"d_in": run.D, "d_sae": run.width, "normalize_activations": "none"}
    kind = run.method.removeprefix("saelens_")
    if kind == "topk":
        sae = topk_sae.TopKTrainingSAE(topk_sae.TopKTrainingSAEConfig(**shape, k=run.l0))
    elif kind == "batch_topk":
        sae = batchtopk_sae.BatchTopKTrainingSAE(
            batchtopk_sae.BatchTopKTrainingSAEConfig(**shape, k=run.l0)
        )
    elif kind == "matryoshka":
        sae = matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE(
            matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAEConfig(
                **shape, k=run.l0, matryoshka_widths=[*run.prefixes, run.width]
            )
        )
    else:
        own = {
            # the paper's loss; its weight is not published: ours, for this norm of the inputs
            "jumprelu_quadratic": {"target_l0": float(run.l0), "l0_coefficient": 0.1 * run.D},
            "jumprelu_tanh": {
                "l0_coefficient": 5.0 * (50 / run.l0) ** 2,
                "jumprelu_bandwidth": 2.0,
                "jumprelu_init_threshold": 0.1,
                "jumprelu_ste_to_input": True,
                "pre_act_loss_coefficient": 3e-6,
            },
        }[kind]
        sae = jumprelu_sae.JumpReLUTrainingSAE(
            jumprelu_sae.JumpReLUTrainingSAEConfig(
                **shape,
                **own,
                jumprelu_sparsity_loss_mode=kind.removeprefix("jumprelu_"),
                l0_warm_up_steps=run.steps // 4,
            )
        )
    config = SAETrainerConfig(
        total_training_samples=run.steps * run.batch,
        train_batch_size_samples=run.batch,
        lr=run.rate,
        lr_end=0.0,
        lr_warm_up_steps=min(100, run.steps // 10),
        lr_decay_steps=run.steps // 4,
        dead_feature_window=min(1000, run.steps // 2),
    )
    trainer = SAETrainer(config, sae, iter(()))

    def update(step: int, x: torch.Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1  # as its `fit` does

    def load(folder: Path) -> dict[str, torch.Tensor]:
        own = SAE.load_from_disk(folder)
        w = {k: getattr(own, n) for k, n in (("w_enc", "W_enc"), ("b_enc", "b_enc"),
             ("w_dec", "W_dec"), ("b_dec", "b_dec"))}  # fmt: skip
        if own.cfg.apply_b_dec_to_input:
            w["b_enc"] = w["b_enc"] - w["b_dec"] @ w["w_enc"]
        if kind == "topk":
            norms = w["w_dec"].norm(dim=1)
            if own.cfg.rescale_acts_by_decoder_norm:  # which its k largest are then chosen by
                w = w | {"w_enc": w["w_enc"] * norms, "b_enc": w["b_enc"] * norms,
                         "w_dec": w["w_dec"] / norms[:, None]}  # fmt: skip
            return w | {"k": torch.tensor(run.l0)}
        return w | {"threshold": own.threshold}

    state = {"sae": sae, "optimizer": trainer.optimizer, "rate": trainer.lr_scheduler}
    state |= {f"coefficient {k}": v for k, v in trainer.coefficient_schedulers.items()}
    names = ("n_training_steps", "n_training_samples", "act_freq_scores",
             "n_forward_passes_since_fired", "n_frac_active_samples")  # fmt: skip
    return Method(
        update,
        run.scale / run.D**0.5,
        state,
        [(trainer, name) for name in names],
        lambda folder: sae.save_inference_model(folder),
        load,
    )


def sparsify(run: Run) -> Method:
    """sparsify's TopK with its AuxK loss and its optimizer, sign descent with schedule-free
    averages; the loop is that of its `Trainer.fit`, which runs a model of its own."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    coder = SparseCoder(run.D, SparseCoderConfig(num_latents=run.width, k=run.l0))
    optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=run.rate), momentum=0.95)
    optimizer.train()
    silent = torch.zeros(run.width, dtype=torch.long)
    dead_after = min(10_000_000, run.tokens // 4)  # its default is longer than these runs

    def update(step: int, x: torch.Tensor) -> None:
        if step == 0:
            coder.b_dec.data = x.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, dead_mask=silent > dead_after)
        (out.fvu + out.auxk_loss / 32).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(len(x))
        silent[out.latent_indices.flatten()] = 0

    def save(folder: Path) -> None:
        optimizer.eval()
        coder.save_to_disk(folder)

    def load(folder: Path) -> dict[str, torch.Tensor]:
        own = SparseCoder.load_from_disk(folder)
        w_enc = own.encoder.weight.T
        assert own.W_dec is not None
        return {
            "w_enc": w_enc,
            "b_enc": own.encoder.bias - own.b_dec @ w_enc,
            "w_dec": own.W_dec,
            "b_dec": own.b_dec,
            "k": torch.tensor(own.cfg.k),
        }

    kept = {"coder": coder, "optimizer": optimizer}
    return Method(update, run.scale / run.D**0.5, kept, [], save, load)


def dictionary_learning(run: Run) -> Method:
    """dictionary_learning's trainers with its AuxK loss; inputs have unit mean squared norm, as
    with its `normalize_activations`."""
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    kind = run.method.removeprefix("dictionary_learning_")
    trainer_class, coder_class, more = {
        "topk": (top_k.TopKTrainer, top_k.AutoEncoderTopK, {}),
        "batch_topk": (batch_top_k.BatchTopKTrainer, batch_top_k.BatchTopKSAE, {}),
        "matryoshka": (
            matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
            matryoshka_batch_top_k.MatryoshkaBatchTopKSAE,
            {"group_fractions": [1 / 16, 3 / 16, 3 / 4]},
        ),
    }[kind]
    trainer = trainer_class(
        steps=run.steps,
        activation_dim=run.D,
        dict_size=run.width,
        k=run.l0,
        layer=12,
        lm_name="google/gemma-3-270m",
        lr=run.rate,
        warmup_steps=min(100, run.steps // 10),
        decay_start=run.steps * 3 // 4,
        threshold_start_step=run.steps // 2,
        threshold_beta=0.99,
        seed=run.seed,
        device="cpu",
        **more,
    )
    trainer.dead_feature_threshold = min(10_000_000, run.tokens // 4)  # longer than these runs

    def load(folder: Path) -> dict[str, torch.Tensor]:
        own = coder_class.from_pretrained(folder / "ae.pt")
        if kind == "matryoshka":
            w_enc, b_enc, w_dec = own.W_enc, own.b_enc, own.W_dec
        else:
            w_enc, b_enc, w_dec = own.encoder.weight.T, own.encoder.bias, own.decoder.weight.T
        w = {"w_enc": w_enc, "b_enc": b_enc - own.b_dec @ w_enc, "w_dec": w_dec, "b_dec": own.b_dec}
        if kind == "topk":
            return w | {"k": own.k}
        return w | {"threshold": own.threshold.expand(run.width)}

    kept = {"coder": trainer.ae, "optimizer": trainer.optimizer, "rate": trainer.scheduler}
    return Method(
        lambda step, x: trainer.update(step, x),
        run.scale,
        kept,
        [(trainer, "num_tokens_since_fired")],
        lambda folder: torch.save(trainer.ae.state_dict(), folder / "ae.pt"),
        load,
    )


LIBRARIES = {"saelens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning}


def train(run: Run, store: Any, rows: int, threads: int) -> dict[str, float]:
    """Train, or go on; leaves `weights.npz`, for raw activations. Seconds of an update."""
    torch.set_num_threads(threads)
    torch.manual_seed(run.seed)
    run.folder.mkdir(parents=True, exist_ok=True)
    library = next(v for k, v in LIBRARIES.items() if run.method.startswith(k))
    method, state = library(run), run.folder / "state.pt"
    done, (wall, cpu) = method.read(state)
    batches, told = store.batches(run.batch, run.seed, start=done, rows=rows), time.monotonic()
    while done < run.steps:
        here = next(batches)["resid_post"][0]
        x = torch.from_numpy(np.asarray(here).astype(np.float32)) / method.scale
        start = time.perf_counter(), time.process_time()
        method.update(done, x)
        wall += time.perf_counter() - start[0]
        cpu += time.process_time() - start[1]
        done += 1
        if time.monotonic() - told > SAVE_EVERY or done == run.steps:
            told = time.monotonic()
            method.write(state, done, (wall, cpu))
            left = (run.steps - done) * wall / done / 60
            print(
                f"{100 * done / run.steps:.0f} %  {done * run.batch / wall:,.0f} tokens/s  "
                f"{left:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
    own = run.folder / "own"
    own.mkdir(exist_ok=True)
    method.save(own)
    w = {k: v.detach().double().numpy() for k, v in method.load(own).items()}
    for name in ("b_enc", "threshold", "b_dec"):  # for raw activations
        if name in w:
            w[name] = w[name] * method.scale
    np.savez(run.folder / "weights.npz", **w)
    return {"seconds": wall / done, "cpu_seconds": cpu / done}


def main() -> None:
    from gemma_scope_jax.data.activations.store import ActivationStore

    given = json.loads(sys.argv[1])
    store, rows, threads = (given.pop(name) for name in ("store", "rows", "threads"))
    run = Run(**given | {"folder": Path(given["folder"])})
    print(json.dumps(train(run, ActivationStore(store), rows, threads)))


if __name__ == "__main__":
    main()
