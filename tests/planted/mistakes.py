"""Mistakes that the tests of `make test` must find: each replaces a text that occurs once in its file.

The tests are files, and options of pytest, that are run first; `run.py --whole` runs all where they find nothing.
"""

from __future__ import annotations

from typing import NamedTuple


class Mistake(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str


PLAN = "sslkernels/contrastive/plan.py"
SETUP = "sslkernels/contrastive/pair_setup.py"
RANK_PLAN = "sslkernels/contrastive/rank_plan.py"
BLOCKS = "tests/contrastive/test_contrastive_blocks.py"
CHUNKS = "sslkernels/vocabulary/chunked_linear.py"
PAIRS = "tests/contrastive/test_contrastive.py tests/contrastive/test_contrastive_losses.py"
REGIMES = "tests/contrastive/test_contrastive_regimes.py"
SLICED = "sslkernels/vocabulary/sliced_rows.py"
SAMPLE = "sslkernels/vocabulary/linear_sample.py"
RANKS = "tests/vocabulary/test_vocabulary_ranks.py"
LINEAR = "tests/vocabulary/test_linear_cross_entropy.py tests/vocabulary/test_capacity.py"

PROTOTYPES = "sslkernels/vocabulary/prototypes/"
DISTILLATION = "tests/vocabulary/test_linear_distillation.py"
PROTOTYPE_LOSS = "tests/vocabulary/test_prototypes.py"
PROTOTYPE_RANKS = "tests/vocabulary/test_prototype_ranks.py"

PYTHON = [
    Mistake(
        "the padding of 16-bit rows is not zeroed",
        "sslkernels/core/chunks.py",
        "rest = -columns % MATMUL_DEPTH",
        "rest = 0",
        "tests/core/test_products.py",
    ),
    Mistake(
        "entropy of a confident row",
        PROTOTYPES + "distillation_reference.py",
        "torch.where(q > 0.5, torch.log1p(-target.rest), q.log())",
        "q.log()",
        DISTILLATION,
    ),
    Mistake(
        "rows without a teacher reach the weight",
        PROTOTYPES + "chunked_distillation.py",
        ".masked_fill_((order.share[chunk] == 0).all(1, keepdim=True), 0)",
        "",
        DISTILLATION,
    ),
    Mistake(
        "a center far from 0 is rounded",
        PROTOTYPES + "distillation_records.py",
        "vector.double() - sums[0] / sums[1].clamp_min(1)",
        "vector.double()",
        DISTILLATION,
    ),
    Mistake(
        "slices have means of their own",
        PROTOTYPES + "distillation_records.py",
        "if slices is not None:\n        dist.all_reduce(sums, group=slices.group)",
        "if False:\n        pass",
        PROTOTYPE_RANKS,
    ),
    Mistake(
        "two slices own a row",
        PROTOTYPES + "sliced_distillation.py",
        "owner == self.slices.rank",
        "owner >= 0",
        PROTOTYPE_RANKS,
    ),
    Mistake(
        "the student's gradient of one slice",
        PROTOTYPES + "linear_distillation.py",
        "student = summed_gradient(student, group)",
        "pass",
        PROTOTYPE_RANKS,
    ),
    Mistake(
        "Sinkhorn forgets the maxima of the ranks",
        PROTOTYPES + "centers.py",
        "sums = sums * (_finite(own) - _finite(largest)).exp()",
        "pass",
        PROTOTYPE_RANKS,
    ),
    Mistake(
        "Sinkhorn counts masked rows",
        PROTOTYPES + "centers.py",
        "share = share if mask is None else share.masked_fill(~mask, 0)",
        "pass",
        PROTOTYPE_LOSS,
    ),
    Mistake(
        "a crop is compared with itself",
        PROTOTYPES + "modules.py",
        "torch.where(same[:, None], -1, rows)",
        "torch.where(same[:, None], rows, rows)",
        PROTOTYPE_LOSS,
    ),
    Mistake(
        "an overflow ends the training",
        PROTOTYPES + "modules.py",
        "torch.where(batch.isfinite(), average, self.center)",
        "average",
        PROTOTYPE_LOSS,
    ),
    Mistake(
        "a count of 0 is infinite",
        "sslkernels/contrastive/words/glove.py",
        "count.log().masked_fill(nothing, 0)",
        "count.log()",
        "tests/contrastive/test_glove.py",
    ),
    Mistake(
        "an alias takes a whole bucket",
        "sslkernels/random/alias_table.py",
        "_ONE + spare[short] - lack[step[short]]",
        "0",
        "tests/random/test_alias_table.py",
    ),
    Mistake(
        "spans end one token late",
        "sslkernels/vocabulary/corrupt_spans.py",
        "(words[column] * of_kind) >> 32 < cuts_of_kind",
        "(words[column] * of_kind) >> 32 <= cuts_of_kind",
        "tests/vocabulary/test_corrupt_spans.py",
    ),
    Mistake("a confident row of a slice", SLICED, "-logprob.expm1(), 1)", "1 - logprob.exp(), 1)", RANKS),
    Mistake("a masked slice is NaN", SLICED, "(row_max == -math.inf) & (bias == -math.inf).all()", "None", RANKS),
    Mistake("a NaN slice is masked", SLICED, " & (bias == -math.inf).all()", "", RANKS),
    Mistake(
        "a class of the slice is ignored",
        SLICED,
        "(ignore_index=-1, label_smoothing=share)",
        "(label_smoothing=share)",
        RANKS,
    ),
    Mistake("a prediction counts the slice", SLICED, "part.prediction + slices.start", "part.prediction", RANKS),
    Mistake(
        "an empty slice has a sum", SLICED, "return torch.ones_like(row_max, dtype=torch.bool)", "return None", RANKS
    ),
    Mistake(
        "ranks reduce other chunks", CHUNKS, "self.vocab if slices is None else slices.largest", "self.vocab", RANKS
    ),
    Mistake(
        "the scale's gradient of one slice",
        "sslkernels/vocabulary/linear_cross_entropy.py",
        "scaled_by = None if scaled_by is None else summed_gradient(scaled_by, group)",
        "pass",
        RANKS,
    ),
    Mistake(
        "token weights summed over ranks",
        "sslkernels/core/ranks.py",
        "(token_weight, replicated=True)",
        "(token_weight)",
        RANKS,
    ),
    Mistake(
        "a slice draws a log-probability", SAMPLE, "if slices.stop == slices.total:", "if slices.start < 0:", RANKS
    ),
    Mistake(
        "a class before the slice is drawn",
        SAMPLE,
        "products[:, :before] = -math.inf",
        "products[:, :before] = 0",
        RANKS,
    ),
    Mistake(
        "a loss of several ranks counts once",
        "sslkernels/vocabulary/modules.py",
        "loss.detach()[..., 0] + (total - total.detach())",
        "loss.mean(-1)",
        "tests/vocabulary/test_linear_head.py",
    ),
    Mistake("no float16 scale for weights of zero", SETUP, "(largest > 0)", "(largest >= 0)", REGIMES),
    Mistake(
        "a batch of gradients is scaled in place",
        "sslkernels/core/scale.py",
        "        and plain((gradient, scale))\n",
        "",
        "tests/core/test_grad_outputs.py",
    ),
    Mistake(
        "a saved gradient is scaled in place",
        "sslkernels/core/scale.py",
        "        and not (saved and torch._C._autograd._get_current_graph_task_keep_graph())\n",
        "",
        "tests/core/test_autograd.py tests/vocabulary/test_kept_gradient.py",
    ),
    Mistake(
        "a gradient of another dtype is scaled in place",
        "sslkernels/core/scale.py",
        "        and gradient.dtype == dtype\n",
        "",
        "tests/core/test_grad_outputs.py",
    ),
    Mistake("half of a two-sided loss", SETUP, "self.half = 0.5 if", "self.half = 1.0 if", PAIRS),
    Mistake(
        "smoothing of columns by candidates of rows",
        SETUP,
        "count = pairs.column_candidates if columns else self.row_candidates",
        "count = self.row_candidates",
        PAIRS,
    ),
    Mistake("share of positives without smoothing", SETUP, "share = (1 - e) * weight", "share = weight", PAIRS),
    Mistake(
        "duplicated positives are no rivals",
        SETUP,
        "> 1, shared, others[self.index])",
        "> 2, shared, others[self.index])",
        REGIMES,
    ),
    Mistake(
        "the norm of a query is left out",
        PLAN,
        "            factor = factor * setup.query_norm[rows]\n",
        "            factor = factor\n",
        "tests/contrastive/test_triton_score_tiles.py -k frozen",
    ),
    Mistake(
        "the scale's gradient of frozen keys is left out",
        PLAN,
        "        self.grads.dot[rows] += factor * weighted_u\n",
        "",
        "tests/contrastive/test_triton_score_tiles.py -k frozen",
    ),
    Mistake("a tile that is read twice counts twice", PLAN, "outputs.dot, alpha=0.5)", "outputs.dot)", PAIRS),
    Mistake(
        "per-query negatives give no gradient to the bias",
        PLAN,
        "            grads.total[rows] += outputs.grad_bias\n",
        "",
        PAIRS,
    ),
    Mistake(
        "slope of hinge negatives has the wrong sign",
        PLAN,
        "slope = -outputs.grad_bias",
        "slope = outputs.grad_bias",
        PAIRS,
    ),
    Mistake(
        "shared columns lose the slopes of other rows",
        PLAN,
        "by_row.weight - setup.pair_weight\n",
        "torch.zeros_like(setup.pair_weight)\n",
        PAIRS,
    ),
    Mistake(
        "columns end on their rank",
        RANK_PLAN,
        "                reduced_over(values, ranks)\n",
        "                pass\n",
        BLOCKS,
    ),
    Mistake(
        "each rank shifts columns by its own maxima",
        RANK_PLAN,
        "largest = reduced_over(sums.max.clone(), ranks, dist.ReduceOp.MAX)",
        "largest = sums.max.clone()",
        BLOCKS,
    ),
    Mistake(
        "a ring loses positives on other ranks",
        RANK_PLAN,
        "(setup.over.remote or its_own)",
        "its_own",
        BLOCKS,
    ),
    Mistake(
        "what rounds off a shared column is lost",
        PLAN,
        "weight = settled(setup.column.weight, reference, state.column_lse)",
        "weight = setup.column.weight",
        "tests/contrastive/test_contrastive_regimes.py",
    ),
    Mistake(
        "a row without negatives is final",
        PLAN,
        "row_others, setup.score.double())\n                self._add_negatives(every, "
        "torch.where(setup.positives.counted, lse, state.row_others), final=True)",
        "row_others, setup.score.double())\n                self._add_negatives(every, "
        "torch.where(setup.positives.counted, lse, state.row_others), final=False)",
        "tests/contrastive/test_contrastive_autograd.py " + PAIRS,
    ),
    Mistake(
        "logit_scale twice in the weight's gradient",
        CHUNKS,
        "            self.grad_weight.mul_(scale)\n",
        "            self.grad_weight.mul_(scale * scale)\n",
        LINEAR,
    ),
    Mistake(
        "logit_scale not in the input's gradient",
        CHUNKS,
        "            self.grad_input.mul_(scale)\n",
        "            pass\n",
        LINEAR,
    ),
    Mistake(
        "later chunks overwrite the weight's gradient",
        "sslkernels/core/products.py",
        "beta=0 if first else 1",
        "beta=0",
        LINEAR,
    ),
    Mistake("the first chunk adds to what is there", CHUNKS, "        self.first = False\n", "", LINEAR),
    Mistake(
        "without rows the gradient is not written",
        CHUNKS,
        "        if self.first:\n            for gradient in",
        "        if False:\n            for gradient in",
        LINEAR,
    ),
    Mistake(
        "ignored rows are left in the input's gradient",
        CHUNKS,
        "self.selection.to_rows(self.grad_input[: self.count], 0, gradients.input)",
        "self.selection.to_rows(self.grad_input[: self.count], 1, gradients.input)",
        LINEAR,
    ),
    Mistake(
        "a block of the vocabulary is added and not written",
        CHUNKS,
        "self.kernels.add(block, product, self.first)",
        "self.kernels.add(block, product, True)",
        LINEAR,
    ),
    Mistake(
        "a gradient in one column is taken for contiguous",
        "sslkernels/core/autograd.py",
        "grad.stride(-1) == 1 or grad.shape[-1] <= 1",
        "grad.dim() > 1 or grad.shape[-1] <= 1",
        "tests/core/test_grad_outputs.py",
    ),
    Mistake(
        "double backward is silent",
        "sslkernels/core/autograd.py",
        '                raise NotImplementedError(f"{ctx.function}: double backward is not supported{instead}")\n',
        "                return None\n",
        "tests/core/test_autograd.py",
    ),
    Mistake(
        "a function is recorded without gradients",
        "sslkernels/core/autograd.py",
        "    return torch.is_grad_enabled() and any(",
        "    return any(",
        "tests/core/test_operator.py",
    ),
    Mistake(
        "records are unpacked one leaf late",
        "sslkernels/core/autograd.py",
        "        end = begin + (1 if record is None else len(record._fields))\n",
        "        end = begin + (1 if record is None else len(record._fields) - 1)\n",
        "tests/core",
    ),
]

CROSS = "csrc/vocabulary/cross_entropy_cpu.cpp"
ROWS = "csrc/contrastive/pair_rows_cpu.cpp"
ROW_TESTS = "tests/vocabulary/test_cross_entropy.py tests/vocabulary/test_loss_options.py"
PAIR_TESTS = "tests/contrastive/test_pair_rows.py tests/contrastive/test_contrastive.py"

CPU = [
    Mistake(
        "exponentials are shared by references that are far apart",
        "csrc/contrastive/score_tiles.h",
        "constexpr double kSharedRange = 30;",
        "constexpr double kSharedRange = 3000;",
        "tests/contrastive/test_native_tiles.py",
    ),
    Mistake(
        "columns far below the largest score",
        "csrc/contrastive/score_tiles_cpu.cpp",
        "for (int64_t j = 0; far > 0 && j < count; ++j)",
        "for (int64_t j = 0; far > 600 && j < count; ++j)",
        "tests/contrastive/test_native_tiles.py",
    ),
    Mistake(
        "the divergence of a confident row",
        "csrc/vocabulary/distillation_cpu.cpp",
        "target.sure(), apart[] = {best, sure}",
        "-1, apart[] = {-1, -1}",
        DISTILLATION,
    ),
    Mistake(
        "softcap's slope is left out", CROSS, "for (int64_t j = 0; j < count; ++j) out[j] *= slope[j];", "", ROW_TESTS
    ),
    Mistake("the first of equal logits", CROSS, "if (maximum > row_max) {", "if (maximum >= row_max) {", ROW_TESTS),
    Mistake(
        "the target stays in the sum",
        CROSS,
        "copy[target - begin] = -std::numeric_limits<A>::infinity();",
        "",
        ROW_TESTS,
    ),
    Mistake(
        "gaps without class weights",
        CROSS,
        "sum += weight[j] > A(0) ? weight[j] * (row_max - z[j]) : A(0);",
        "sum += weight[j] > A(0) ? (row_max - z[j]) : A(0);",
        ROW_TESTS,
    ),
    Mistake(
        "smoothing of a weighted gradient",
        CROSS,
        "(z[j] - row_max) - smooth * w[j];",
        "(z[j] - row_max) - smooth;",
        ROW_TESTS,
    ),
    Mistake(
        "the target's gradient in the next column",
        CROSS,
        "if (here) out[target - begin] = target_grad;",
        "if (here) out[(target - begin + 1) % count] = target_grad;",
        ROW_TESTS,
    ),
    Mistake("the bias of the first block", CROSS, "const A* add = bias + begin;", "const A* add = bias;", ROW_TESTS),
    Mistake(
        "an ignored row keeps its gradient",
        CROSS,
        "if (rows.grad != nullptr) fill_gradient<T>(rows, i, value);",
        "",
        ROW_TESTS,
    ),
    Mistake(
        "the entropy of a masked class",
        CROSS,
        "sum += exp > A(0) ? exp * shifted : exp;",
        "sum += exp * shifted;",
        ROW_TESTS,
    ),
    Mistake(
        "a clamped norm is differentiated",
        ROWS,
        "norm * A(kNormEps) < A(1);",
        "norm * A(kNormEps) <= A(2);",
        PAIR_TESTS,
    ),
    Mistake("projection along the wrong norm", ROWS, "along *= norm * norm;", "along *= norm;", PAIR_TESTS),
    Mistake(
        "the partner's norm is left out",
        ROWS,
        "factor *= norm * entry<A>(args.partner_norm, partner);",
        "factor *= norm;",
        PAIR_TESTS,
    ),
    Mistake(
        "a row without a positive has a loss",
        ROWS,
        "(counted || args.energy == Energy::kSigmoid)",
        "(true)",
        PAIR_TESTS,
    ),
    Mistake(
        "the positive itself is no positive",
        ROWS,
        "A(lse - (args.positive_sum[i] + score)",
        "A(lse - (args.positive_sum[i])",
        PAIR_TESTS,
    ),
    Mistake("a slope of infinite similarity", ROWS, "if (row.slope != A(0)) args.dot[i]", "args.dot[i]", PAIR_TESTS),
    Mistake(
        "the slope of smoothing",
        ROWS,
        "row.slope -= entry<A>(args.smoothing, i);",
        "row.slope += entry<A>(args.smoothing, i);",
        PAIR_TESTS,
    ),
    Mistake(
        "an index out of range is no NaN",
        ROWS,
        "std::numeric_limits<A>::quiet_NaN();\n    if (key >= 0",
        "A(0);\n    if (key >= 0",
        PAIR_TESTS,
    ),
]

ENERGY = "csrc/latent/free_energy.cu"
SEGMENTS = "csrc/core/segment_sums.cu"
SAMPLE = "csrc/vocabulary/sample_rows.cu"
HOST_ENERGY = "tests/cuda_host/test_host_energy.py"
HOST_SUMS = "tests/cuda_host/test_host_negative_sampling.py"
HOST_SAMPLE = "tests/cuda_host/test_host_sample_rows.py"

CUDA = [
    Mistake(
        "a gap forgets the old maximum",
        "csrc/vocabulary/distillation.cu",
        "factor * (lower.student_gap + sum * distance)",
        "factor * lower.student_gap",
        "tests/cuda_host/test_host_distillation.py",
    ),
    Mistake(
        "the row is overwritten while it is read",
        "csrc/vocabulary/distillation.cu",
        "sums = SumsReduction<A>::over_cluster(sums, &reinterpret_cast<Scratch<A>*>(shared_memory())->sums);",
        "",
        "tests/cuda_host/test_host_distillation.py",
    ),
    Mistake(
        "no barrier before warps are combined",
        ENERGY,
        "shared[threadIdx.x / kWarpSize] = state;\n      __syncthreads();",
        "shared[threadIdx.x / kWarpSize] = state;",
        HOST_ENERGY,
    ),
    Mistake(
        "no barrier before lanes are combined",
        ENERGY,
        "= states[j];\n      __syncthreads();\n      if (place.lane > 0) return;",
        "= states[j];\n      if (place.lane > 0) return;",
        HOST_ENERGY,
    ),
    Mistake(
        "a lane is left out",
        ENERGY,
        "for (int lane = 1; lane < plan.depth; ++lane)",
        "for (int lane = 2; lane < plan.depth; ++lane)",
        HOST_ENERGY,
    ),
    Mistake(
        "elements beyond the last candidate",
        ENERGY,
        "return count - k < kSize ? count - k : kSize;",
        "return kSize;",
        HOST_ENERGY,
    ),
    Mistake(
        "results beyond the row", ENERGY, "if (j < place.results) write_result", "if (true) write_result", HOST_ENERGY
    ),
    Mistake(
        "the state of another row",
        ENERGY,
        "scale[j] /= static_cast<const A*>(energies.total)[r];",
        "scale[j] /= static_cast<const A*>(energies.total)[0];",
        HOST_ENERGY,
    ),
    Mistake(
        "the gradient goes by the stride of the energies",
        ENERGY,
        "to + first * gradient.count_stride, to_stride",
        "to + first * energies.count_stride, to_stride",
        HOST_ENERGY,
    ),
    Mistake(
        "no barrier before warps add up",
        SEGMENTS,
        "+ lane] = sum[k];\n  __syncthreads();",
        "+ lane] = sum[k];",
        HOST_SUMS,
    ),
    Mistake(
        "an empty row is not written",
        SEGMENTS,
        "while (row < chunk.last_row) end_row();",
        "if (row < chunk.last_row) end_row();",
        HOST_SUMS,
    ),
    Mistake(
        "the sum of a row goes on", SEGMENTS, "for (int k = 0; k < N; ++k) sum[k] = 0;\n    ++row;", "++row;", HOST_SUMS
    ),
    Mistake("a warp's part is left out", SEGMENTS, "other = at + 1 + warp;", "other = at + 2 + warp;", HOST_SUMS),
    Mistake(
        "an index out of range is read",
        SEGMENTS,
        "        own_row = 0;\n        own_weight = A(NAN);",
        "        own_weight = A(NAN);",
        HOST_SUMS,
    ),
    Mistake(
        "the noise of the first tile for all",
        SAMPLE,
        "group(uint64_t(sample.first_column / kGroup + place.lane))",
        "group(uint64_t(place.lane))",
        HOST_SAMPLE,
    ),
    Mistake(
        "the sum of earlier tiles is left out",
        SAMPLE,
        "own.sum += moved(*sum_exp, begun_max, own.max);",
        "own.sum += A(0);",
        HOST_SAMPLE,
    ),
    Mistake("the bias of the first tile", SAMPLE, "if (bias != nullptr) bias += sample.first_column;", "", HOST_SAMPLE),
    Mistake(
        "a filter that is too narrow",
        SAMPLE,
        "constexpr float kMost = 24.6f;",
        "constexpr float kMost = 2.46f;",
        HOST_SAMPLE,
    ),
]

TILES = "sslkernels/contrastive/triton/tile_sum_kernels.py"
REDUCE = "sslkernels/vocabulary/triton/linear_cross_entropy.py"
GAUSSIAN = "sslkernels/latent/triton/gaussian.py"
GUARD = " tests/core/test_guard_pages.py"
TILE_TESTS = "tests/contrastive/test_triton_score_tiles.py"
REDUCE_TESTS = "tests/vocabulary/test_triton_linear.py tests/vocabulary/test_linear_cross_entropy.py"
GAUSSIAN_TESTS = "tests/latent/test_gaussian.py tests/latent/test_gaussian_noise.py"

TRITON = [
    Mistake(
        "the divergence of a confident row in Triton",
        "sslkernels/vocabulary/triton/distillation_rows.py",
        "tl.where(q > 0.5, log1p(-rest_of_q), tl.log(tl.where(q == 0.0, 1.0, q)))",
        "tl.log(tl.where(q == 0.0, 1.0, q))",
        DISTILLATION,
    ),
    Mistake("an old maximum keeps its weight", TILES, "total * exp_flushed(largest - anchor) +", "total +", TILE_TESTS),
    Mistake(
        "all rows add to the first column block",
        TILES,
        "later = row_tile > first_row",
        "later = row_tile > 0",
        TILE_TESTS,
    ),
    Mistake(
        "a column beyond the end is written",
        TILES,
        "existing = lane < columns - column",
        "existing = lane <= columns - column",
        TILE_TESTS + GUARD,
    ),
    Mistake(
        "rows count above of equal scores",
        TILES,
        "above, equal = s > score, s == score",
        "above, equal = s >= score, s == score",
        TILE_TESTS + " tests/contrastive/test_contrastive_statistics.py",
    ),
    Mistake(
        "partials of the sums of rows start at row 0", TILES, "at_row = row_part + row", "at_row = row_part", TILE_TESTS
    ),
    Mistake(
        "sums before are forgotten", TILES, "before + total.to(before.dtype)", "total.to(before.dtype)", TILE_TESTS
    ),
    Mistake(
        "the score of positives by id is left out",
        TILES,
        "extra_sum += tl.sum(tl.where(extra, s, 0.0), 1)",
        "extra_sum += 0.0",
        TILE_TESTS,
    ),
    Mistake(
        "the next split wins a tie",
        REDUCE,
        "better = (split_best > best)",
        "better = (split_best >= best)",
        REDUCE_TESTS,
    ),
    Mistake(
        "a split's sum keeps its maximum",
        REDUCE,
        "others += split_others * decay",
        "others += split_others",
        REDUCE_TESTS,
    ),
    Mistake(
        "a target out of range has a loss",
        REDUCE,
        'row_loss = tl.where(wrong, float("nan"), row_loss)',
        "row_loss = tl.where(wrong, 0.0, row_loss)",
        REDUCE_TESTS,
    ),
    Mistake("the z-loss is linear", REDUCE, "z_loss * lse * lse", "z_loss * lse", REDUCE_TESTS),
    Mistake(
        "smoothing by the vocabulary and not the weights",
        REDUCE,
        "            all_weights = tl.load(weight_sum)\n",
        "            all_weights += 0.0\n",
        REDUCE_TESTS,
    ),
    Mistake(
        "row_ids are ignored: the noise depends on the row's index",
        GAUSSIAN,
        "row_id = tl.load(row_ids_ptr + row_id, mask=row_id < rows, other=0)",
        "row_id = row_id + 0",
        GAUSSIAN_TESTS,
    ),
    Mistake(
        "every draw is the first",
        GAUSSIAN,
        "draw = tl.full((), 0, tl.int64) + sample",
        "draw = tl.full((), 0, tl.int64) + sample * 0",
        GAUSSIAN_TESTS,
    ),
    Mistake(
        "free bits from above",
        GAUSSIAN,
        "kl = tl.where(kl < least, least, kl)\n            if BY_ROW",
        "kl = tl.where(kl > least, least, kl)\n            if BY_ROW",
        GAUSSIAN_TESTS,
    ),
    Mistake("the divergence lacks its half", GAUSSIAN, "0.5 * (t * t + excess)", "(t * t + excess)", GAUSSIAN_TESTS),
    Mistake(
        "columns beyond the end are in the sum",
        GAUSSIAN,
        "& (col < columns - column)",
        "& (col <= columns - column)",
        GAUSSIAN_TESTS + GUARD,
    ),
    Mistake(
        "a mean of averages without weights",
        GAUSSIAN,
        "average += (own - average) * weight",
        "average += (own - average) * 0.5",
        GAUSSIAN_TESTS,
    ),
]

MISTAKES = {"python": PYTHON, "cpu": CPU, "cuda": CUDA, "triton": TRITON}
