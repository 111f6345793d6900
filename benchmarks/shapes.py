"""What is measured: a list that was frozen before the first timing.

Half of the series may be used for tuning; the other half never is, and is shown apart. A change of
the list is a change of the digest in its test, so that it cannot go unseen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from fractions import Fraction
from itertools import product

RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
FEW_RATIOS = (1 / 8, 1 / 2, 1.0)


@dataclass(frozen=True, slots=True)
class Cell:
    """One adapted layer at one sketch ratio.

    Attributes:
        name: model and projection.
        tokens: T.
        in_features: D.
        out_features: E.
        rank: R.
        sketch_size: S.
        dtype: name of torch's dtype.
        device: torch's device type.
        tuned: the cell may be used for tuning.
    """

    name: str
    tokens: int
    in_features: int
    out_features: int
    rank: int
    sketch_size: int
    dtype: str
    device: str
    tuned: bool

    @property
    def ratio(self) -> float:
        """S/R."""
        return self.sketch_size / self.rank

    @property
    def series(self) -> str:
        """What the cells that differ only in S have in common."""
        return f"{self.name}-t{self.tokens}-r{self.rank}-{self.dtype}"

    @property
    def id(self) -> str:
        """Unique in a list, and what ``--shapes`` matches."""
        return f"{self.series}-s{self.sketch_size}"


@dataclass(frozen=True, slots=True)
class Series:
    """One layer at several sketch ratios; the attributes are those of ``Cell``."""

    name: str
    in_features: int
    out_features: int
    tokens: int
    rank: int
    tuned: bool
    ratios: tuple[float, ...] = RATIOS
    dtype: str = "float32"

    def cells(self, device: str) -> Iterator[Cell]:
        """Yield a cell for each ratio that gives another sketch size."""
        for size in sorted({max(1, round(self.rank * ratio)) for ratio in self.ratios}):
            yield Cell(
                self.name,
                self.tokens,
                self.in_features,
                self.out_features,
                self.rank,
                size,
                self.dtype,
                device,
                self.tuned,
            )


CPU = (
    Series("square-768", 768, 768, 512, 64, tuned=True),
    Series("square-768", 768, 768, 2048, 64, tuned=False),
    Series("square-768", 768, 768, 512, 64, tuned=False, dtype="bfloat16"),
    Series("square-768", 768, 768, 2048, 64, tuned=True, dtype="bfloat16"),
    Series("square-2048", 2048, 2048, 512, 64, tuned=True, ratios=FEW_RATIOS),
    Series("square-2048", 2048, 2048, 2048, 64, tuned=False, ratios=FEW_RATIOS),
    Series("minilm-q", 384, 384, 2048, 64, tuned=True, ratios=FEW_RATIOS),
    Series("minilm-up", 384, 1536, 512, 64, tuned=False, ratios=FEW_RATIOS),
    Series("roberta-up", 768, 3072, 512, 64, tuned=True, ratios=FEW_RATIOS),
    Series("roberta-down", 3072, 768, 2048, 64, tuned=False, ratios=FEW_RATIOS),
)

CUDA = (
    Series("8b-q", 4096, 4096, 8192, 64, tuned=True, dtype="bfloat16"),
    Series("8b-gate", 4096, 14336, 8192, 128, tuned=True, dtype="bfloat16"),
    Series("8b-down", 14336, 4096, 2048, 256, tuned=True, dtype="bfloat16"),
    Series("3b-k", 3072, 1024, 8192, 64, tuned=True, dtype="bfloat16"),
    Series("3b-gate", 3072, 8192, 512, 16, tuned=True, dtype="bfloat16"),
    Series("70b-q", 8192, 8192, 2048, 64, tuned=True, dtype="bfloat16"),
    Series("8b-q", 4096, 4096, 16384, 256, tuned=False, dtype="bfloat16"),
    Series("8b-k", 4096, 1024, 2048, 16, tuned=False, dtype="bfloat16"),
    Series("3b-q", 3072, 3072, 512, 64, tuned=False, dtype="bfloat16"),
    Series("3b-down", 8192, 3072, 8192, 64, tuned=False, dtype="bfloat16"),
    Series("70b-k", 8192, 1024, 16384, 64, tuned=False, dtype="bfloat16"),
    Series("70b-gate", 8192, 28672, 2048, 128, tuned=False, dtype="bfloat16"),
)

DEFAULTS = {"cpu": CPU, "cuda": CUDA}

# What the targets for a GPU are stated on, apart from the frozen list: the projections of an 8B
# layer, and the squares that LoRAFusion is measured on.
GPU_TARGETS = tuple(
    Cell(name, 8192, in_features, out_features, rank, 16, "bfloat16", "cuda", tuned)
    for name, in_features, out_features, rank, tuned in (
        ("8b-q", 4096, 4096, 64, True),
        ("8b-k", 4096, 1024, 64, False),
        ("8b-gate", 4096, 14336, 64, True),
        ("8b-down", 14336, 4096, 64, False),
        ("square-4096", 4096, 4096, 16, True),
        ("square-5120", 5120, 5120, 16, False),
        ("square-8192", 8192, 8192, 16, False),
    )
)

# The axes of --full, beside the default's layers and ratios.
FULL_TOKENS = {"cpu": (128, 512, 2048), "cuda": (512, 2048, 8192, 16384)}
FULL_RANKS = {"cpu": (16, 64, 128), "cuda": (16, 64, 128, 256)}


def cells(device: str, *, full: bool = False, names: Sequence[str] = ()) -> list[Cell]:
    """Return the cells to measure.

    Args:
        device: torch's device type.
        full: every layer of the default list with all ratios, tokens, ranks and dtypes. A cell of a
            series that may be tuned on keeps that mark; all others are unseen.
        names: beginnings of cell ids, or patterns with * in them; empty takes all.

    Returns:
        The cells in the order of the list.

    Raises:
        ValueError: a name matches nothing.
    """
    series = DEFAULTS[device]
    chosen = [cell for one in (_full(device) if full else series) for cell in one.cells(device)]
    for name in names:
        if not any(fnmatch(cell.id, f"{name}*") for cell in chosen):
            known = ", ".join(dict.fromkeys(cell.name for cell in chosen))
            raise ValueError(
                f"no cell on {device} is named {name!r}; layers are {known}, and a cell is "
                f"named like {chosen[0].id}"
            )
    return [c for c in chosen if not names or any(fnmatch(c.id, f"{name}*") for name in names)]


def _full(device: str) -> Iterator[Series]:
    default = DEFAULTS[device]
    tuned = {(s.name, s.tokens, s.rank, s.dtype) for s in default if s.tuned}
    layers = dict.fromkeys((s.name, s.in_features, s.out_features) for s in default)
    axes = (FULL_TOKENS[device], FULL_RANKS[device], ("float32", "bfloat16"))
    for (name, in_features, out_features), tokens, rank, dtype in product(layers, *axes):
        yield Series(
            name,
            in_features,
            out_features,
            tokens,
            rank,
            tuned=(name, tokens, rank, dtype) in tuned,
            dtype=dtype,
        )


def ratio_name(ratio: float) -> str:
    """Write a sketch ratio as a fraction."""
    return str(Fraction(ratio).limit_denominator(256))
