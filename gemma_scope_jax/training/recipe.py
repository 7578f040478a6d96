"""What a training run is: nested frozen dataclasses, written beside the weights they made.

Defaults are the published recipe (Gemma Scope 2 technical paper, section 3) where it is known;
fields that the paper leaves open, or that a short run needs otherwise, say so. A `configs/*.py`
file exposes one `TrainConfig` as `config`.
"""

import dataclasses
from typing import Any

from gemma_scope_jax.data.documents import TextData
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.storage.strict_json import legible

ACTIVATIONS = ("jumprelu", "topk", "batch_topk")
SPARSITIES = ("quadratic", "step", "tanh")
PRECISIONS = ("default", "bfloat16", "tensorfloat32", "float32")


def _check(config: Any, what: str, test: Any, *names: str) -> None:
    """Raise `InputError` for the first of the fields that is not `what`."""
    for name in names:
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and test(value)):
            raise InputError(f"{name} must be {what}, not {value!r}")


def _positive(config: Any, *names: str) -> None:
    _check(config, "positive", lambda v: v > 0, *names)


def _not_negative(config: Any, *names: str) -> None:
    _check(config, "a number that is not negative", lambda v: v >= 0, *names)


def _whole(config: Any, least: int, *names: str) -> None:
    _check(
        config,
        f"a whole number from {least} on",
        lambda v: isinstance(v, int) and v >= least,
        *names,
    )


def _share(config: Any, *names: str) -> None:
    _check(config, "at least 0 and below 1", lambda v: 0 <= v < 1, *names)


def _tuples(config: Any, *names: str) -> None:
    """Lists become tuples, as compiled programs need them; `InputError` for what is neither."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise InputError(f"{name} must be a tuple, not {value!r}")
        object.__setattr__(config, name, tuple(value))


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        hint = nearest(value, known)
        raise InputError(f"{what} {value!r} is none of {', '.join(known)}{hint}")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What one coder minimises, each activation of unit mean squared norm.

    Losses compose: reconstruction (the mean over `prefixes` where there are any), sparsity,
    frequency, the revival of dead features and, with `kl_weight`, the effect on the model.
    """

    sparsity: str = "quadratic"
    """The sparsity loss: "quadratic" is equation (5), which aims at a target L0; "step" is equation
    (4), without target; "tanh" is Anthropic's."""
    l0_weight: float = 0.1
    """lambda, the weight of the sparsity loss; the paper does not give it."""
    l0_warmup: int | float = 50_000
    """Updates over which lambda grows from 0; below 1 a share of the run's updates."""
    l0_start: float | None = None
    """The target L0 at the start, which comes down linearly over `l0_warmup`."""
    per_token: bool = True
    """Square each token's distance to the target L0, as equation (5) is written; false squares that
    of the batch mean, so that one token may use more features than another."""
    tanh_scale: float = 4.0
    """c in tanh(c f), where decoder rows have unit norm."""
    frequency_limit: float = 0.1
    """The share of tokens above which a feature is penalised."""
    frequency_weight: float = 0.0
    """The weight of that penalty (`losses.frequency_penalty`); the paper gives no formula."""
    bandwidth: float = 0.001
    """The width of the straight-through kernel."""
    dead_below: float = 0.01
    """A feature is dead while it is active on a smaller share of tokens than this times the mean
    feature's, target_l0 / (layers * width)."""
    dead_after: int = 1000
    """Updates over which that share is averaged: how long a silent feature takes to count as
    dead."""
    dead_weight: float = 0.01
    """The weight of the pre-activation loss that revives dead features; 0 turns it off. It is not
    in the paper but in Anthropic's circuits updates of January 2025. Adam moves silent features
    alike at any weight: it matters for those that are active now and then."""
    outlier: float = 3.0
    """Tokens above this many root-mean-square norms count as if at it: one token in a thousand has
    6 times the median norm, 40 times its square."""
    kl_weight: float = 0.0
    """beta of equation (6), end-to-end finetuning; 0 turns it off."""

    def __post_init__(self) -> None:
        _one_of("sparsity", self.sparsity, SPARSITIES)
        _positive(self, "bandwidth", "outlier", "frequency_limit", "tanh_scale", "dead_below")
        _not_negative(self, "l0_weight", "frequency_weight", "dead_weight", "kl_weight")
        _whole(self, 0, "dead_after")
        warmup = "a whole number from 0 on, or a share below 1"
        _check(self, warmup, lambda v: v >= 0 and (v < 1 or isinstance(v, int)), "l0_warmup")
        if self.l0_start is not None:
            _positive(self, "l0_start")


@dataclasses.dataclass(frozen=True)
class CoderConfig:
    """One coder: an SAE or transcoder on one layer; a crosscoder or CLT over several.

    `layers` is an int for a coder of one layer and a tuple for one of several. It reads one site
    and writes the same one (SAE, crosscoder) or another (transcoder, CLT).
    """

    layers: int | tuple[int, ...]
    """The model's layer, or the layers of a coder of several: 12, or 5,9,12,15."""
    reads: str = "resid_post"
    """The site that it reads."""
    writes: str = ""
    """The site that it writes; the default is the one it reads."""
    width: int = 4096
    """Features of each layer."""
    target_l0: float = 50.0
    """Features that are active on a token, over all layers."""
    activation: str = "jumprelu"
    """"jumprelu"; or "topk", which keeps target_l0 features of each token over all layers; or
    "batch_topk", which keeps as many on average and is saved as the JumpReLU nearest to it."""
    as_jump_relu: bool = False
    """Save "topk", too, as a JumpReLU: another function, whose figures are on its card."""
    skip: bool = False
    """Add an affine skip connection, x @ w_skip."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka: the first so many features must reconstruct alone, too."""
    input_bias: bool = True
    """Subtract b_dec from the input of a coder that writes what it reads."""
    threshold: float | None = 0.001
    """The thresholds at the start; None takes them from the data (`init.from_data`)."""
    init_from: str = ""
    """The folder or address of a coder to finetune."""
    init_layers: tuple[str, ...] = ()
    """Coders of one layer to start from, one a layer (`init.from_coders`)."""
    seed: int = 0
    """The random seed of the first weights."""
    name: str = ""
    """The name of its folder; the default is made from the rest."""
    loss: LossConfig = LossConfig()
    """What it minimises."""

    def __post_init__(self) -> None:
        _one_of("activation", self.activation, ACTIVATIONS)
        _tuples(self, "prefixes", "init_layers")
        if not isinstance(self.layers, int):
            _tuples(self, "layers")
        if any(isinstance(n, bool) or not isinstance(n, int) for n in self.layer_tuple):
            raise InputError(f"layers must be a whole number or a tuple of them, not {self.layers}")
        _whole(self, 1, "width")
        _whole(self, 0, "seed")
        _positive(self, "target_l0")
        if self.threshold is not None:
            _not_negative(self, "threshold")
        if self.target_l0 >= self.width * len(self.layer_tuple):
            raise InputError(f"target_l0 {self.target_l0} must be below the width {self.width}")
        if list(self.layer_tuple) != sorted(set(self.layer_tuple)) or not self.layer_tuple:
            raise InputError(f"layers {self.layers} must be one layer, or several in rising order")
        if list(self.prefixes) != sorted(set(self.prefixes)) or not all(
            0 < p < self.width for p in self.prefixes
        ):
            raise InputError(f"prefixes {self.prefixes} must rise and lie below {self.width}")
        if self.init_layers and len(self.init_layers) != len(self.layer_tuple):
            raise InputError(f"init_layers has {len(self.init_layers)} coders, not one a layer")
        if self.init_from and self.init_layers:
            raise InputError("init_from and init_layers exclude each other")
        if self.activation != "jumprelu" and self.target_l0 != int(self.target_l0):
            raise InputError(f"{self.activation} needs a whole target_l0, not {self.target_l0}")
        if self.as_jump_relu and self.activation != "topk":
            raise InputError(f"as_jump_relu is for topk: {self.activation} is saved so anyway")

    @property
    def k(self) -> int | None:
        """Of the saved coder: how many features of a token are kept, None for JumpReLU."""
        exact = self.activation == "topk" and not self.as_jump_relu
        return int(self.target_l0) if exact else None

    @property
    def layer_tuple(self) -> tuple[int, ...]:
        return (self.layers,) if isinstance(self.layers, int) else tuple(self.layers)

    @property
    def is_multi_layer(self) -> bool:
        return not isinstance(self.layers, int)

    @property
    def target(self) -> str:
        """The site it writes."""
        return self.writes or self.reads

    @property
    def apply_b_dec_to_input(self) -> bool:
        """Whether b_dec is subtracted from the input."""
        return self.input_bias and self.target == self.reads

    @property
    def folder(self) -> str:
        """Its folder, named as in the release, with the width and the target L0 in figures."""
        if self.name:
            return self.name
        if self.is_multi_layer:
            kind = "crosscoder" if self.target == self.reads else "clt"
            layers = list(self.layer_tuple)
            run = len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1))
            names = [layers[0], "to", layers[-1]] if run else layers
            where = f"{kind}/layer_{'_'.join(map(str, names))}"
        else:
            site = {"z": "attn_out"}.get(self.reads, self.reads)
            where = f"{site if self.target == self.reads else 'transcoder'}/layer_{self.layers}"
        ends = "_affine" if self.skip else ""
        activation = "" if self.activation == "jumprelu" else f"_{self.activation}"
        seed = f"_seed_{self.seed}" if self.seed else ""
        return f"{where}_width_{self.width}_l0_{self.target_l0:g}{activation}{ends}{seed}"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam, as published; the same for all coders of a run."""

    learning_rate: float = 7e-5
    """The learning rate after the warm-up."""
    warmup: int = 1000
    """Updates over which the learning rate grows, by a cosine from a tenth."""
    decay: float = 0.0
    """The share of the updates, at the end, over which it falls linearly to 0; none in the
    paper."""
    b1: float = 0.0
    """The decay of Adam's first moments."""
    b2: float = 0.999
    """The decay of Adam's second moments."""
    epsilon: float = 1e-8
    """Adam's epsilon."""
    step_limit: float = 1e-3
    """The most that a feature's weights move in an update (root mean square), or the learning rate
    if that is larger (`optimizer.limited`); not in the paper; 0 turns it off."""
    clip: float = 1.2
    """The largest norm of a coder's gradients, in usual norms (`optimizer.clipped`); not in the
    paper; 0 turns it off."""

    def __post_init__(self) -> None:
        _check(self, "above 0 and at most 1", lambda v: 0 < v <= 1, "learning_rate")
        _positive(self, "epsilon")
        _not_negative(self, "clip", "step_limit")
        _whole(self, 0, "warmup")
        _share(self, "b1", "b2")
        _check(self, "a share from 0 to 1", lambda v: 0 <= v <= 1, "decay")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Any number of coders fed by one model pass, or by one activation store."""

    coders: tuple[CoderConfig, ...]
    """The coders that are trained, all in one run."""
    data: TextData = TextData()
    """The text that the model reads."""
    store: str = ""
    """A folder of stored activations to read instead of `data` (`gemma-scope activations`)."""
    model: str = "gemma-3-270m"
    """The model: a name, a folder or a file."""
    model_dtype: str = "bfloat16"
    """The dtype of the model's matrices: bfloat16 or float32."""
    tokens: int = 4_000_000
    """Tokens that the model reads, <bos> included; from a store, the activations drawn."""
    batch_size: int = 4
    """Sequences of a model pass."""
    context_size: int = 1024
    """Tokens of a sequence."""
    first: int = 1
    """Leading positions that are not trained on: 1 for <bos>, 4 for chats."""
    buffer: int = 131_072
    """Activations that are shuffled on the device."""
    train_batch_size: int = 4096
    """Activations of an update."""
    updates: int = 1
    """Optimizer updates of a model pass: an activation is seen updates * train_batch_size /
    (batch_size * context_size) times on average."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Adam, the same for all coders."""
    sparse: float = 4.0
    """Slots for the active features of a token in the sparse step, in target L0s; 0 computes dense
    products. Tokens that need more make that update dense."""
    precision: str = "default"
    """The precision of the coders' products, float32 in and out: "default" is the backend's (TPU:
    one pass of bfloat16, GPU: TF32); CPUs compute in float32 whatever is set."""
    mesh: tuple[int, int] | None = None
    """Devices over the batch and over the features; None takes all over the features, and on CPUs
    one device."""
    held_out: float = 1 / 64
    """The share of the text or store that is never trained on, on which the saved coders are
    measured; short runs hold out more (`held_share`)."""
    seed: int = 0
    """The random seed of the order of the text."""
    checkpoint_every: float = 300.0
    """Seconds between checkpoints; 0 writes one after every pass."""
    keep: int = 2
    """Checkpoints that are kept."""
    track: tuple[str, ...] = ()
    """Where curves go beside log.jsonl: "tensorboard", "wandb"."""

    def __post_init__(self) -> None:
        counts = (
            "tokens",
            "batch_size",
            "context_size",
            "buffer",
            "train_batch_size",
            "updates",
            "keep",
        )
        _whole(self, 1, *counts)
        _whole(self, 0, "first", "seed")
        _not_negative(self, "sparse", "checkpoint_every")
        _check(self, "above 0 and at most a half", lambda v: 0 < v <= 0.5, "held_out")
        _tuples(self, "coders", "track")
        if self.mesh is not None:
            _tuples(self, "mesh")
            if len(self.mesh) != 2 or not all(isinstance(n, int) and n > 0 for n in self.mesh):
                raise InputError(f"mesh must be two numbers of devices, not {self.mesh}")
        if not self.coders:
            raise InputError("a run needs at least one coder")
        _one_of("precision", self.precision, PRECISIONS)
        for name in self.track:
            _one_of("track", name, ("tensorboard", "wandb"))
        if not self.store and self.buffer < max(
            self.train_batch_size, 2 * self.batch_size * self.context_size
        ):
            raise InputError(f"buffer {self.buffer} must hold a batch and two model passes")
        if not self.store and self.tokens <= self.buffer:
            raise InputError(f"tokens {self.tokens} do not fill the buffer of {self.buffer}")
        if self.store and any(c.loss.kl_weight for c in self.coders):
            raise InputError("kl_weight needs the model on text, not stored activations")
        if self.updates > 1 and any(c.loss.kl_weight for c in self.coders):
            raise InputError("kl_weight needs updates=1: it makes one update of a model pass")
        folders = [c.folder for c in self.coders]
        twice = sorted({f for f in folders if folders.count(f) > 1})
        if twice:
            raise InputError(f"two coders are called {twice[0]}: give one another name or seed")

    @property
    def tokens_a_pass(self) -> int:
        return (
            self.updates * self.train_batch_size
            if self.store
            else self.batch_size * self.context_size
        )

    @property
    def held_share(self) -> float:
        """Of the text or store, held out: where `held_out` would be too little, more."""
        return max(self.held_out, min(1 / 16, 1024 / self.tokens))

    @property
    def warmed(self) -> "TrainConfig":
        """This config with every `l0_warmup` that is a share as a number of updates."""
        filling = 0 if self.store else -(-self.buffer // self.tokens_a_pass)  # passes before them
        updates = max(0, self.passes - filling) * self.updates

        def counted(coder: CoderConfig) -> CoderConfig:
            if not 0 < coder.loss.l0_warmup < 1:
                return coder
            loss = dataclasses.replace(coder.loss, l0_warmup=int(coder.loss.l0_warmup * updates))
            return dataclasses.replace(coder, loss=loss)

        return dataclasses.replace(self, coders=tuple(map(counted, self.coders)))

    @property
    def passes(self) -> int:
        """Calls of the compiled step in all."""
        return max(1, self.tokens // self.tokens_a_pass)


def as_json(config: Any) -> dict:
    """A config as plain JSON values (tuples become lists), names that are not UTF-8 legible."""
    return legible(dataclasses.asdict(config))
