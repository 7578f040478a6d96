"""One graph of many prompts: every edge's mean effect, with an interval over the prompts.

    pruned = (gs.attribute(model, coders, ids).prune() for ids in prompts)
    print(gs.aggregate_graphs(pruned))

An edge of one prompt may be an accident of it. Between the same features of many prompts, what
holds is told by the share of prompts in which an edge is, and by the interval of its mean. The
graphs are taken one by one and only their edges are kept.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from gemma_scope_jax.circuits.graph import Graph, Nodes
from gemma_scope_jax.circuits.shared_nodes import (
    Finals,
    Measure,
    Positions,
    SharedNodes,
    edges_of,
    ends,
    node_names,
)
from gemma_scope_jax.circuits.tables import text_table
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number

SHOWN = 20  # edges of a printed table
DRAWN = 1 << 22  # numbers of resampled means in memory at a time


@dataclasses.dataclass(frozen=True)
class GraphAggregate:
    """Edges over several prompts, those with the largest mean effects first; prints as a table.

    nodes           the nodes of the edges: see `Nodes`; positions are negative if counted from the
                    end, -1 if ignored
    target, source  int64 [E]: of each edge the rows of `nodes`
    mean            float64 [E]: the mean effect over the prompts, 0 where a prompt has no such edge
    low, high       float64 [E]: the percentile interval of the mean, by resampling prompts
    present         float64 [E]: the share of prompts that have the edge
    prompts         their number
    level           what share of resampled means the interval holds
    edges           how many edges there are in all, of which these have the largest means
    positions       how nodes were matched
    """

    nodes: Nodes
    target: np.ndarray
    source: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    present: np.ndarray
    prompts: int
    level: float
    edges: int
    positions: Positions

    def __len__(self) -> int:
        return len(self.target)

    def __str__(self) -> str:
        return self.table()

    def table(self, most: int = SHOWN) -> str:
        """The `most` edges with the largest mean effects, as text."""
        names = (
            node_names(self.nodes, w[:most], self.positions) for w in (self.source, self.target)
        )
        rows = [
            (source, target, f"{mean:.4g}", f"[{low:.4g}, {high:.4g}]", f"{present:.0%}")
            for source, target, mean, low, high, present in zip(
                *names, self.mean, self.low, self.high, self.present
            )
        ]
        head = f"{self.edges:,} edges of {self.prompts} prompts"
        interval = f"{self.level:.0%} interval"
        return f"{head}\n{text_table(('source', 'target', 'mean', interval, 'prompts'), rows)}"


def aggregate_graphs(
    graphs: Iterable[Graph],
    *,
    positions: Positions = "ignore",
    finals: Finals = "mean",
    measure: Measure = "effect",
    level: float = 0.95,
    resamples: int = 1000,
    least_present: float = 0.0,
    most_edges: int = 10_000,
    seed: int = 0,
) -> GraphAggregate:
    """The edges of several prompts' graphs: mean, interval, and how many prompts have them.

    graphs     any iterable: each graph is let go of after its edges are read; prune large ones
    positions  "ignore": edges between features wherever they are active, summed within a prompt;
               "end" or "start": positions count, from the end or from the start
    finals     "mean": the targets of a prompt are one, by their weights, so that prompts with
               different answers agree; "token" and "order", and `measure`, as in
               `graph_difference`
    level, resamples, seed  the share of means that intervals hold, of that many resampled sets of
               prompts; the same seed gives the same intervals
    least_present  leave out edges that fewer than this share of prompts have
    most_edges how many edges to keep, those with the largest means

    Raises `InputError` for no graphs, models of different depth, and numbers that cannot be.
    """
    for name, value in {"resamples": resamples, "most_edges": most_edges}.items():
        whole_number(name, value, 1)
    if not 0 < level < 1 or not 0 <= least_present <= 1:
        raise InputError(f"level={level}, least_present={least_present}: shares from 0 to 1")
    shared = SharedNodes(positions, finals, measure)
    found = [edges_of(graph, shared) for graph in graphs]
    if not found:
        raise InputError("no graphs to aggregate: give at least one")
    number, where = np.unique(np.concatenate([n for n, _ in found]), return_inverse=True)
    effect = np.concatenate([e for _, e in found])
    prompt = np.repeat(np.arange(len(found)), [len(n) for n, _ in found])
    count = len(found)
    mean = np.bincount(where, effect, len(number)) / count
    present = np.bincount(where[effect != 0], minlength=len(number)) / count
    order = np.argsort(-np.abs(mean), kind="stable")
    kept = order[present[order] >= least_present][:most_edges]
    place = np.full(len(number), -1)
    place[kept] = np.arange(len(kept))
    some = place[where] >= 0
    columns = prompt[some], place[where][some], effect[some]
    low, high = _intervals(columns, (count, len(kept)), level, resamples, seed)
    target, source = ends(number[kept])
    return GraphAggregate(
        shared.nodes(), target, source, mean[kept], low, high, present[kept], count, level,
        len(number), positions,
    )  # fmt: skip


def _intervals(
    columns: tuple[np.ndarray, np.ndarray, np.ndarray],
    shape: tuple[int, int],
    level: float,
    resamples: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of the means of resampled rows of a sparse matrix (row, column, value)."""
    import scipy.sparse

    row, column, value = columns
    matrix = scipy.sparse.csc_array((value, (row, column)), shape=shape)
    count, edges = shape
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    shares = drawn / count  # [resamples, prompts]: how often each prompt was drawn
    cuts = (0.5 - level / 2, 0.5 + level / 2)
    low, high = np.zeros((2, edges))
    step = max(1, DRAWN // resamples)
    for start in range(0, edges, step):
        some = slice(start, start + step)
        low[some], high[some] = np.quantile(shares @ matrix[:, some], cuts, axis=0)
    return low, high
