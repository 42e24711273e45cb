"""Which kernel files the tests on a GPU run: what the mark `kernels` names, by public op."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_ROWS = ("softmax_rows.py", "softmax_row_kernels.py")
_PAIRS = ("pair_rows", "tile_gradients", "tile_positives", "tile_sum_kernels", "tile_sums", "tile_weighted_sums")
_SEGMENTS = ("csrc/core/segment_sums.cu", "sslkernels/core/triton/segment_sum.py")

# An op whose kernels are all in files of its own name, such as csrc/latent/gaussian.cu, needs no entry.
SHARED = {
    "cross_entropy": (
        *(f"csrc/vocabulary/cross_entropy{kind}.cu" for kind in ("", "_half", "_bfloat16")),
        *(f"sslkernels/vocabulary/triton/{name}" for name in _ROWS),
    ),
    "linear_cross_entropy": (
        "csrc/core/column_sums.cu",
        "csrc/core/scale_add.cu",
        "sslkernels/vocabulary/triton/linear_cross_entropy.py",
        "sslkernels/vocabulary/triton/probability_rows.py",
        "sslkernels/core/triton/scale.py",
    ),
    "linear_distillation": ("csrc/vocabulary/distillation.cu", "sslkernels/vocabulary/triton/distillation_rows.py"),
    "linear_sample": ("csrc/vocabulary/sample_rows.cu", "sslkernels/vocabulary/triton/linear_sample.py"),
    "random": ("csrc/random/random_stream.cu", "sslkernels/random/triton/streams.py"),
    "AliasTable": ("csrc/random/alias_table.cu", "sslkernels/random/triton/alias_table.py"),
    "contrastive_energy": tuple(f"sslkernels/contrastive/triton/{name}.py" for name in _PAIRS),
    "info_nce": ("csrc/contrastive/query_negatives.cu", "sslkernels/contrastive/triton/query_negatives.py"),
    "negative_sampling_loss": (
        "csrc/contrastive/negative_sampling.cu",
        "sslkernels/contrastive/triton/word2vec.py",
        *_SEGMENTS,
    ),
    "glove_loss": ("csrc/contrastive/glove.cu", "sslkernels/contrastive/triton/glove.py", *_SEGMENTS),
    "gaussian_rsample": ("csrc/latent/gaussian.cu", "sslkernels/latent/triton/gaussian.py"),
    "gumbel_softmax": ("csrc/latent/gumbel.cu", "sslkernels/latent/triton/gumbel_rows.py"),
    "gumbel_quantize": ("csrc/latent/gumbel.cu", "sslkernels/latent/triton/gumbel_rows.py", *_SEGMENTS),
    "vector_quantize": (
        "csrc/latent/best_codes.cu",
        "csrc/latent/vector_quantize.cu",
        "sslkernels/latent/triton/nearest_code.py",
        "sslkernels/latent/triton/vector_quantize.py",
        *_SEGMENTS,
    ),
}


def files_of(op: str) -> tuple[str, ...]:
    if op in SHARED:
        return SHARED[op]
    own = [*ROOT.glob(f"csrc/*/{op}.cu"), *ROOT.glob(f"sslkernels/*/triton/{op}.py")]
    if not own:
        raise ValueError(f"no kernel file is called {op!r}: name its files in SHARED")
    return tuple(str(path.relative_to(ROOT)) for path in own)


def kernels(*ops: str) -> pytest.MarkDecorator:
    """The mark of a test that runs these ops on a GPU."""
    return pytest.mark.kernels(*dict.fromkeys(file for op in ops for file in files_of(op)))
