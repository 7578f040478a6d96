"""A reference for logistic probes, tables of texts, and a vocabulary that can spell."""

import numpy as np
import scipy.optimize

from gemma_scope_jax.probing import absorption as spelling
from gemma_scope_jax.probing.absorption import LETTERS
from gemma_scope_jax.probing.tables import read_table


def reference_fit(x, y, c, weight):
    """scikit-learn's objective, minimised by scipy from zero."""
    center = x.mean(0)  # moves the optimal intercept, nothing else

    def loss(theta):
        margin = (x - center) @ theta[:-1] + theta[-1]
        value = 0.5 * theta[:-1] @ theta[:-1] + c * weight @ (np.logaddexp(0, margin) - y * margin)
        error = c * weight * (1 / (1 + np.exp(-margin)) - y)
        return value, np.append(theta[:-1] + (x - center).T @ error, error.sum())

    start = np.zeros(x.shape[1] + 1)
    found = scipy.optimize.minimize(
        loss,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 20000, "maxfun": 40000, "ftol": 1e-16, "gtol": 1e-9},
    )
    return found.x[:-1], found.x[-1] - center @ found.x[:-1]


def write_table(path, rows, header="prompt,target"):
    path.write_text("\n".join([header, *(",".join(map(str, r)) for r in rows)]) + "\n")
    return read_table(path)


class Spelled:
    """A vocabulary of words and of the pieces of the prompt, for a model with 300 tokens."""

    bos_id = 2

    def __init__(self, each=8):
        fixed = ["<pad>", "<eos>", "<bos>", "\n", spelling.QUESTION, "12", "a-b", " ", ""]
        fixed += [f" {letter.upper()}" for letter in LETTERS]  # answers; and words, too
        words = [f" {letter}{'xyzuvwst'[i]}" for letter in LETTERS for i in range(each)]
        self.pieces = fixed + words
        self.pieces += [f"#{i}" for i in range(300 - len(self.pieces))]
        self.special = np.arange(300) < 3

    def encode(self, text, bos=True):
        parts = [text] if text in self.pieces else text.split("|")
        return np.array([2] * bos + [self.pieces.index(p) for p in parts], np.int32)

    def decode_tokens(self, ids):
        return [self.pieces[i] for i in ids]
