"""What a training run is: one frozen dataclass, written beside the weights it made.

Defaults are the published recipe (Gemma Scope 2 technical paper, section 3.2) where it is known;
fields that the paper leaves open, or that a short run needs otherwise, say so.
"""

import dataclasses

from gemma_scope_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One JumpReLU SAE on one site of one layer."""

    data: tuple[str, ...]  # glob patterns of text files, documents separated by a form feed line
    model: str = "gemma-3-270m"
    model_dtype: str = "bfloat16"
    site: str = "resid_post"
    layer: int = 12
    width: int = 4096
    target_l0: float = 50.0
    tokens: int = 4_000_000  # tokens the model reads, <bos> included
    rows: int = 4  # sequences a model pass
    length: int = 512
    buffer: int = 131_072  # activations shuffled on the device
    batch: int = 4096  # activation vectors an update
    updates: int = 1  # optimizer updates a model pass: each activation is seen
    #                   updates * batch / (rows * length) times on average
    learning_rate: float = 7e-5
    learning_rate_warmup: int = 1000  # updates, cosine from a tenth
    learning_rate_decay: float = 0.0  # share of the updates at the end with linear decay; paper: 0
    b1: float = 0.0
    b2: float = 0.999
    epsilon: float = 1e-8
    bandwidth: float = 0.001
    threshold: float | None = 0.001  # at the start; None: from the data, see `step.start`
    l0_weight: float = 0.03  # lambda; not published
    l0_warmup: int = 50_000  # updates over which lambda grows from 0
    per_token: bool = True  # the square of equation (5) per token, as it is written, or of the mean
    dead_after: int = 1000  # updates without activity after which a feature counts as dead
    dead_weight: float = 1e-3  # of the pre-activation loss that revives dead features; not in the
    #                            paper, from Anthropic's circuits updates, January 2025; 0: off
    outlier: float = 3.0  # tokens above this many root-mean-square norms count as if at it;
    #                       one token in a thousand has 6 times the median norm, 40 times its square
    seed: int = 0
    checkpoint_every: float = 300.0  # seconds

    def __post_init__(self) -> None:
        positive = (
            "width", "target_l0", "tokens", "rows", "length", "buffer", "batch", "updates",
            "learning_rate", "bandwidth", "outlier",
        )  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, not {getattr(self, name)!r}")
        if self.target_l0 >= self.width:
            raise InputError(f"target_l0 {self.target_l0} must be below the width {self.width}")
        if self.buffer < max(self.batch, 2 * self.rows * self.length):
            raise InputError(f"buffer {self.buffer} must hold a batch and two model passes")

    @property
    def fill_passes(self) -> int:
        """Model passes that fill the buffer before the first update."""
        return -(-self.buffer // (self.rows * self.length))

    @property
    def passes(self) -> int:
        """Model passes in all."""
        return max(1, self.tokens // (self.rows * self.length))

    @property
    def total_updates(self) -> int:
        return max(0, self.passes - self.fill_passes) * self.updates
