"""The recipe of a training run: nested frozen dataclasses, saved beside the weights they made.

Defaults are the published recipe (Gemma Scope 2 technical paper, section 3) where it is known;
fields that are not in the paper say so. That recipe is for billions of tokens: where another value
is better in runs of under ten million, the default is by the length of the run (`lengths`). A
`configs/*.py` file sets `config` to a `TrainConfig`.
"""

import dataclasses
import functools
from typing import Any

from gemma_scope_jax.data.documents import TextData
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.storage.strict_json import legible
from gemma_scope_jax.training.lengths import BY_LENGTH, by_length, counted, filled

ACTIVATIONS = ("jumprelu", "topk", "batch_topk")
SPARSITIES = ("quadratic", "step", "tanh")
PRECISIONS = ("default", "bfloat16", "tensorfloat32", "float32")

_MUST_BE = {
    "positive": lambda v: v > 0,
    "a number that is not negative": lambda v: v >= 0,
    "at least 0 and below 1": lambda v: 0 <= v < 1,
    "above 0 and at most 1": lambda v: 0 < v <= 1,
    "above 0 and at most a half": lambda v: 0 < v <= 0.5,
    "a share from 0 to 1": lambda v: 0 <= v <= 1,
    "a whole number from 0 on": lambda v: isinstance(v, int) and v >= 0,
    "a whole number from 1 on": lambda v: isinstance(v, int) and v >= 1,
    "a whole number from 0 on, or a share below 1": lambda v: (
        v >= 0 and (v < 1 or isinstance(v, int))
    ),
}


def _check(config: Any, what: str, *names: str) -> None:
    """Raise `InputError` for the first of the fields that is not `what` of `_MUST_BE`."""
    for name in names:
        value = getattr(config, name)
        if value is None and name in BY_LENGTH.get(type(config).__name__, {}):
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and _MUST_BE[what](value)):
            raise InputError(f"{name} must be {what}, not {value!r}")


def _tuples(config: Any, *names: str) -> None:
    """Turn lists into tuples, as compiled programs need them; `InputError` for anything else."""
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
    """The losses of one coder, for activations of unit mean squared norm.

    They add up: reconstruction (the mean over `prefixes`, if any), sparsity, frequency, the revival
    of dead features and, with `kl_weight`, the effect on the model.
    """

    sparsity: str = "quadratic"
    """The sparsity loss: "quadratic" is equation (5), which aims at a target L0; "step" is equation
    (4), which has no target; "tanh" is Anthropic's."""
    l0_weight: float = 0.1
    """lambda, the weight of the sparsity loss; the paper does not give it."""
    l0_warmup: int | float = by_length
    """Updates over which lambda grows from 0, by default 0 in short runs and 50,000 in long ones;
    below 1, a share of the run's updates."""
    l0_start: float | None = None
    """The target L0 at the start, from which the target falls linearly over `l0_warmup`."""
    per_token: bool = by_length
    """Square each token's distance from the target L0, as in equation (5), the default of long
    runs; false, that of short ones, squares the distance of the batch mean, so that some tokens may
    use more features than others."""
    tanh_scale: float = 4.0
    """c in tanh(c f), for decoder rows of unit norm."""
    frequency_limit: float = 0.1
    """The share of tokens above which a feature is penalised."""
    frequency_weight: float = 0.0
    """The weight of this penalty (`losses.frequency_penalty`); the paper gives no formula."""
    bandwidth: float = 0.001
    """The width of the straight-through kernel."""
    dead_below: float = 0.01
    """A feature is dead while its share of active tokens is below this times that of the mean
    feature, target_l0 / (layers * width)."""
    dead_after: int = by_length
    """Updates over which that share is averaged, and after which a feature that no longer fires is
    dead; by default 200 in short runs, 1,000 in long ones."""
    dead_weight: float = 0.01
    """The weight of the pre-activation loss that revives dead features; 0 turns it off. It is not
    in the paper, but in Anthropic's circuits updates of January 2025. Under Adam it matters for
    features that fire now and then; those that never fire move alike at any weight."""
    outlier: float = 3.0
    """Tokens above this many root-mean-square norms are weighted as if they were at it: one token
    in a thousand has 6 times the median norm, 40 times its square."""
    kl_weight: float = 0.0
    """beta of equation (6), end-to-end finetuning; 0 turns it off."""

    def __post_init__(self) -> None:
        _one_of("sparsity", self.sparsity, SPARSITIES)
        positive = ["bandwidth", "outlier", "frequency_limit", "tanh_scale", "dead_below"]
        _check(self, "positive", *positive, *(["l0_start"] if self.l0_start is not None else []))
        weights = ("l0_weight", "frequency_weight", "dead_weight", "kl_weight")
        _check(self, "a number that is not negative", *weights)
        _check(self, "a whole number from 0 on", "dead_after")
        _check(self, "a whole number from 0 on, or a share below 1", "l0_warmup")

    @property
    def of_thresholds(self) -> list[str]:
        """The fields that are set and act on thresholds only."""
        names = {
            "l0_start": self.l0_start is not None,
            "frequency_weight": self.frequency_weight > 0,
            "sparsity": self.sparsity != "quadratic",
        }
        return [f"loss.{name}" for name, given in names.items() if given]


@dataclasses.dataclass(frozen=True)
class CoderConfig:
    """One coder: an SAE or transcoder on one layer; a crosscoder or CLT over several layers.

    It reads one site and writes the same one (SAE, crosscoder) or another (transcoder, CLT).
    """

    layers: int | tuple[int, ...]
    """The layer of an SAE or transcoder, 12; or the layers of a crosscoder or CLT, 5,9,12,15."""
    reads: str = "resid_post"
    """The site that the coder reads."""
    writes: str = ""
    """The site that the coder writes; the default is the one it reads."""
    width: int = 4096
    """Features of each layer."""
    target_l0: float = 50.0
    """The number of features to be active on a token, over all layers."""
    activation: str = by_length
    """"jumprelu"; "topk", which keeps target_l0 features of each token over all layers; or
    "batch_topk", which keeps as many on average and is saved as the nearest JumpReLU. By default
    "batch_topk" in short runs that start anew and ask for nothing of JumpReLU's own (a threshold,
    l0_start, a frequency penalty, another sparsity loss), otherwise "jumprelu"."""
    as_jump_relu: bool = False
    """Also save "topk" as a JumpReLU, which is another function; its figures are on the card."""
    skip: bool = False
    """Add an affine skip connection, x @ w_skip."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka: the first n features must also reconstruct alone, for each of these n."""
    input_bias: bool = True
    """Subtract b_dec from the input of a coder that writes what it reads."""
    threshold: float | None = None
    """The thresholds at the start; None derives them from the data (`init.from_data`), which is not
    in the paper: it starts from 0.001."""
    init_from: str = ""
    """The folder or address of a coder to finetune."""
    init_layers: tuple[str, ...] = ()
    """Coders of one layer to start from, one for each layer (`init.from_coders`)."""
    seed: int = 0
    """The random seed of the first weights."""
    name: str = ""
    """The name of the coder's folder; the default is made from the other fields."""
    loss: LossConfig = LossConfig()
    """The losses of the coder."""

    def __post_init__(self) -> None:
        if self.activation is not None:
            _one_of("activation", self.activation, ACTIVATIONS)
        _tuples(self, "prefixes", "init_layers")
        if not isinstance(self.layers, int):
            _tuples(self, "layers")
        if any(isinstance(n, bool) or not isinstance(n, int) for n in self.layer_tuple):
            raise InputError(f"layers must be a whole number or a tuple of them, not {self.layers}")
        _check(self, "a whole number from 1 on", "width")
        _check(self, "a whole number from 0 on", "seed")
        _check(self, "positive", "target_l0")
        if self.threshold is not None:
            _check(self, "a number that is not negative", "threshold")
        if list(self.layer_tuple) != sorted(set(self.layer_tuple)) or not self.layer_tuple:
            raise InputError(f"layers {self.layers} must be one layer, or several in rising order")
        if self.target_l0 >= self.width * len(self.layer_tuple):
            raise InputError(f"target_l0 {self.target_l0} must be below the width {self.width}")
        ends = (0, *self.prefixes, self.width)
        if list(ends) != sorted(set(ends)):
            raise InputError(
                f"prefixes {self.prefixes} must rise, and stay below the width {self.width}"
            )
        if self.init_layers and len(self.init_layers) != len(self.layer_tuple):
            count = len(self.init_layers)
            raise InputError(f"init_layers has {count} coders, not one for each layer")
        if self.init_from and self.init_layers:
            raise InputError("init_from and init_layers exclude each other")
        if self.activation == "topk" and self.target_l0 != int(self.target_l0):
            raise InputError(f"topk needs a whole target_l0, not {self.target_l0}")
        if self.activation in ("topk", "batch_topk") and (names := self.loss.of_thresholds):
            raise InputError(
                f"{self.activation} trains no thresholds, which {' and '.join(names)} would act "
                'on: leave that out, or set activation="jumprelu"'
            )
        if self.as_jump_relu and self.activation != "topk":
            raise InputError(f"as_jump_relu is for topk: {self.activation} is saved as one anyway")

    @property
    def k(self) -> int | None:
        """How many features of a token the saved coder keeps; None for JumpReLU."""
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
        """The site that the coder writes."""
        return self.writes or self.reads

    @property
    def apply_b_dec_to_input(self) -> bool:
        """Whether b_dec is subtracted from the input."""
        return self.input_bias and self.target == self.reads

    @property
    def folder(self) -> str:
        """The coder's folder, named as in the release, with numbers for width and target L0."""
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
        activation = "" if self.activation in (None, "jumprelu") else f"_{self.activation}"
        seed = f"_seed_{self.seed}" if self.seed else ""
        return f"{where}_width_{self.width}_l0_{self.target_l0:g}{activation}{ends}{seed}"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam, as published; the same for all coders of a run."""

    learning_rate: float = by_length
    """The learning rate after the warm-up; by default 0.006 in short runs, 0.0045 in those with
    transcoders, and 7e-5 in long ones."""
    warmup: int | float = by_length
    """Updates over which the learning rate grows along a cosine, from a tenth; below 1, a share of
    the run's updates. By default a twentieth in short runs, 1,000 in long ones."""
    decay: float = by_length
    """The share of the updates, at the end, over which the rate falls linearly to 0; by default a
    quarter in short runs, 0, as published, in long ones."""
    b1: float = by_length
    """The decay of Adam's first moments; by default 0.8 in short runs, 0, as published, in long
    ones."""
    b2: float = 0.999
    """The decay of Adam's second moments."""
    epsilon: float = 1e-8
    """Adam's epsilon."""
    step_limit: float = 1e-3
    """The most that a feature's weights move in an update (root mean square), or the learning rate
    if that is larger (`optimizer.limited`); not in the paper; 0 turns it off."""
    clip: float = by_length
    """The largest norm of a coder's gradients, as a multiple of their usual norm
    (`optimizer.clipped`); not in the paper; 0 turns it off. By default 2 in short runs, which would
    diverge at twice their learning rate without it, and 1.2 in long ones."""
    threshold_rate: float = by_length
    """The learning rate of thresholds as a multiple of that of weights; that of dead features'
    thresholds is never multiplied. By default 0.03 in short runs: thresholds that move as fast as
    weights at a high rate walk at random. 1 in long ones."""

    def __post_init__(self) -> None:
        _check(self, "above 0 and at most 1", "learning_rate")
        _check(self, "positive", "epsilon")
        _check(self, "a number that is not negative", "clip", "step_limit", "threshold_rate")
        _check(self, "a whole number from 0 on, or a share below 1", "warmup")
        _check(self, "at least 0 and below 1", "b1", "b2")
        _check(self, "a share from 0 to 1", "decay")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Any number of coders trained on one model pass, or on one activation store."""

    coders: tuple[CoderConfig, ...]
    """The coders to train, all in one run."""
    data: TextData = TextData()
    """The text that the model reads."""
    store: str = ""
    """A folder of stored activations to read instead of `data` (`gemma-scope activations`)."""
    model: str = "gemma-3-270m"
    """The model: a name, a folder or a file."""
    model_dtype: str = "bfloat16"
    """The dtype of the model's matrices: bfloat16 or float32."""
    tokens: int = 4_000_000
    """The number of tokens that the model reads, <bos> included; with a store, the number of
    activations drawn."""
    batch_size: int = 4
    """The number of sequences in a model pass."""
    context_size: int = 1024
    """The number of tokens in a sequence."""
    first: int = 1
    """Leave out this many leading positions of a text: 1 for <bos>, 4 for chats."""
    buffer: int = 131_072
    """The number of activations that are shuffled on the device."""
    train_batch_size: int = by_length
    """The number of activations in an update; by default 1,024 in short runs, 4,096 in long
    ones."""
    updates: int = by_length
    """Optimizer updates for each model pass: an activation is used updates * train_batch_size /
    (batch_size * context_size) times on average; by default about once."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Adam, the same for all coders."""
    sparse: float = 4.0
    """Slots for the active features of a token in the sparse step, as a multiple of the target L0,
    or 128 if that is more; 0 computes dense products. An update in which too many tokens need more
    is dense."""
    precision: str = "default"
    """The precision of the coders' products, float32 in and out: "default" is the backend's (TPU:
    one pass of bfloat16, GPU: TF32); CPUs always compute in float32."""
    mesh: tuple[int, int] | None = None
    """Devices over the batch and over the features; None spreads the features over all devices, and
    uses one device on CPUs."""
    held_out: float = 1 / 64
    """The share of the text or store that is never trained on; the saved coders are measured on it.
    Short runs hold out more (`held_share`)."""
    seed: int = 0
    """The random seed of the order of the text."""
    checkpoint_every: float = 300.0
    """Seconds between checkpoints; 0 writes one after every pass."""
    keep: int = 2
    """The number of checkpoints to keep."""
    track: tuple[str, ...] = ()
    """Also write curves for these programs, beside log.jsonl: "tensorboard", "wandb"."""

    def __post_init__(self) -> None:
        sizes = ("batch_size", "context_size", "train_batch_size", "buffer")
        _check(self, "a whole number from 1 on", "tokens", *sizes, "updates", "keep")
        _check(self, "a whole number from 0 on", "first", "seed")
        _check(self, "a number that is not negative", "sparse", "checkpoint_every")
        _check(self, "above 0 and at most a half", "held_out")
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
        least = max(self.train_batch_size or 1, 2 * self.batch_size * self.context_size)
        if not self.store and self.buffer < least:
            raise InputError(
                f"buffer {self.buffer} must hold a batch and two model passes: at least {least}"
            )
        if not self.store and self.tokens <= self.buffer:
            raise InputError(
                f"tokens {self.tokens} do not fill the buffer of {self.buffer}: lower buffer"
            )
        by_effect = any(c.loss.kl_weight for c in self.coders)
        if self.store and by_effect:
            raise InputError("kl_weight needs the model on text, not stored activations")
        if (self.updates or 1) > 1 and by_effect:
            raise InputError("kl_weight needs updates=1: it makes one update for each model pass")
        folders = [c.folder for c in self.coders]
        if twice := sorted({f for f in folders if folders.count(f) > 1}):
            raise InputError(f"two coders are called {twice[0]}: give one another name or seed")

    @property
    def tokens_a_pass(self) -> int:
        if self.store:
            return self.resolved.updates * self.resolved.train_batch_size
        return self.batch_size * self.context_size

    @property
    def held_share(self) -> float:
        """The share of the text or store that is held out: `held_out`, or more in short runs."""
        return max(self.held_out, min(1 / 16, 1024 / self.tokens))

    @property
    def passes(self) -> int:
        """How often the compiled step is called."""
        return max(1, self.tokens // self.tokens_a_pass)

    @property
    def all_updates(self) -> int:
        """Optimizer updates of the whole run: none in the passes that fill the buffer."""
        filling = 0 if self.store else -(-self.buffer // self.tokens_a_pass)
        return max(0, self.passes - filling) * self.resolved.updates

    @functools.cached_property
    def resolved(self) -> "TrainConfig":
        """This config with all defaults by length filled in, and each warm-up that is a share
        turned into a number of updates. A resolved config is its own."""
        config = filled(self)
        config.__dict__["resolved"] = config
        config = counted(config)
        config.__dict__["resolved"] = config
        return config


def as_json(config: TrainConfig) -> dict[str, Any]:
    """A config as plain JSON values, with names that are not UTF-8 made legible."""
    return legible(dataclasses.asdict(config))
