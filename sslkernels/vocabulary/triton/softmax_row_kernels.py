"""Kernels of the cross-entropy of rows of logits: one program per row, optionally with the gradient, also in place.

A row is read as its 16-byte aligned groups (the body, tile by tile) and the fewer than two groups at its ends (the
edge, a separate tile): rows of any width are read and written with full vectors, and nothing outside them is touched.
The first loop keeps a running maximum and per-lane sums relative to it, which are reduced once at the end. The second
loop reads the row again, backwards because the cache still holds the end, and writes the gradient. A row that fits one
tile stays in registers and is read once. Apart from the gradient, nothing of the size of the logits is materialised.
"""

import triton
import triton.language as tl

from sslkernels.core.triton.numerics import expm1, log1p, shifted_moment, tanh

NOT_SPECIALIZED = ["vocab", "coefficient_stride", "ignore_index"]


@triton.jit
def vector_tile(start, vocab, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Columns, the mask of lanes to access, which is uniform per vector, and the mask of columns of the row."""
    cols = start + tl.arange(0, BLOCK)
    return cols, cols // VECTOR * VECTOR < vocab, cols < vocab


@triton.jit
def uncapped_logits(raw, bias, cols, mask, logit_scale, HAS_BIAS: tl.constexpr):
    """l of raw logits in the accumulation dtype."""
    value = raw * logit_scale
    if HAS_BIAS:
        value += tl.load(bias + cols, mask, other=0.0).to(value.dtype)
    return value


@triton.jit
def capped(value, mask, softcap, HAS_SOFTCAP: tl.constexpr):
    """z from l; -inf outside the mask."""
    if HAS_SOFTCAP:
        value = softcap * tanh(value / softcap)
    return tl.where(mask, value, float("-inf"))


@triton.jit
def cap_slope(value, softcap):
    """dz/dl of a softcap; 1 - tanh^2 would cancel where the tanh is near 1."""
    e = tl.exp(-2.0 * tl.abs(value / softcap))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def transformed(raw, bias, cols, mask, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """z of raw logits in the accumulation dtype; -inf outside the mask."""
    return capped(uncapped_logits(raw, bias, cols, mask, logit_scale, HAS_BIAS), mask, softcap, HAS_SOFTCAP)


@triton.jit
def _load_uncapped(logits, at, bias, cols, mask, logit_scale, HAS_BIAS: tl.constexpr):
    raw = tl.load(logits + at, mask, other=0.0).to(logit_scale.dtype)
    return uncapped_logits(raw, bias, cols, mask, logit_scale, HAS_BIAS)


@triton.jit
def _load_z(logits, at, bias, cols, mask, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    value = _load_uncapped(logits, at, bias, cols, mask, logit_scale, HAS_BIAS)
    return capped(value, mask, softcap, HAS_SOFTCAP)


@triton.jit
def _split_row(offset, vocab, VECTOR: tl.constexpr, ROWS_ALIGNED: tl.constexpr):
    """Start of the body of the row at `offset`, in the tensor and in the row, and its length."""
    # Written so that the compiler can prove divisibility by VECTOR.
    if ROWS_ALIGNED:
        body = offset // VECTOR * VECTOR
        head = 0
    else:
        body = (offset + (VECTOR - 1)) // VECTOR * VECTOR
        head = tl.minimum(body - offset, vocab).to(tl.int32)
    return body, head, (vocab - head) // VECTOR * VECTOR


@triton.jit
def _edge(head, length, vocab, VECTOR: tl.constexpr):
    """Columns outside the body of the row, and the mask of lanes that hold one."""
    lane = tl.arange(0, 2 * VECTOR)
    tail = head + length + lane - VECTOR
    return tl.where(lane < VECTOR, lane, tail), tl.where(lane < VECTOR, lane < head, tail < vocab)


@triton.jit
def _tile(start, length, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Positions in the body and their mask, which is uniform per group, so that accesses stay vectorised."""
    lane = tl.arange(0, BLOCK)
    return start + lane, lane // VECTOR * VECTOR < length - start


@triton.jit
def _sums(
    z, cols, mask, anchor, y, smooth_anchor, weight,
    STATS: tl.constexpr, SMOOTHING: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Per lane: e = exp(z - anchor) and e * (z - anchor), both 0 at the target, and weight * (z - smooth_anchor)."""
    e = tl.where(cols == y, 0.0, tl.exp(z - anchor))
    moment = e
    smooth = e
    if STATS:
        moment = tl.where(e > 0.0, e * (z - anchor), 0.0)
    if SMOOTHING:
        smooth = tl.where(mask, z - smooth_anchor, 0.0)
        if HAS_WEIGHT:
            w = tl.load(weight + cols, mask, other=0.0).to(z.dtype)
            smooth = tl.where(w > 0.0, w * smooth, 0.0)
    return e, moment, smooth


@triton.jit
def ranked(z):
    """NaN ranks as the largest, like in torch.argmax."""
    return tl.where(z != z, float("inf"), z)


@triton.jit
def _accumulate(
    z, cols, mask, y, smooth_anchor, weight, row_max, others, moment, smooth, best, best_col,
    STATS: tl.constexpr, SMOOTHING: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Updates the running maximum of the row and the per-lane sums with a tile."""
    new_max = tl.maximum(row_max, tl.max(z, 0))
    anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
    decay = tl.exp(row_max - anchor)
    e, m, s = _sums(z, cols, mask, anchor, y, smooth_anchor, weight, STATS, SMOOTHING, HAS_WEIGHT)
    if STATS:
        shift = tl.where(row_max == float("-inf"), 0.0, row_max - anchor)
        moment = shifted_moment(moment, others, shift, decay) + m
        better = mask & ((ranked(z) > best) | (best_col < 0))
        best = tl.where(better, ranked(z), best)
        best_col = tl.where(better, cols, best_col)
    others = others * decay + e
    if SMOOTHING:
        smooth += s
    return new_max, others, moment, smooth, best, best_col


@triton.jit
def _lowest(values, cols, valid, largest):
    return tl.min(tl.where(valid & (values == largest), cols, 2147483647), 0)


@triton.jit
def log_probability(target_z, row_max, others):
    """(sum of exp including the target, its log, log-probability of the target), from the sum of the other classes
    relative to row_max. A target that outweighs all others has a log-probability near 0, which log1p keeps exact."""
    target_shifted = target_z - row_max
    target_exp = tl.exp(target_shifted)
    sum_exp = others + target_exp
    confident = target_exp > others
    direct = tl.log(sum_exp)
    small = log1p(tl.where(confident, others / target_exp, 0.0))
    return sum_exp, tl.where(confident, small, direct), tl.where(confident, -small, target_shifted - direct)


@triton.jit
def converted(values, ACC: tl.constexpr):
    """The scalars of a tuple in the accumulation dtype."""
    found = ()
    for i in tl.static_range(len(values)):
        found = found + (tl.full((), values[i], ACC),)  # noqa: RUF005, of which Triton has none
    return found


@triton.jit
def _class_weights(
    weight, weight_sum, y, vocab, ACC: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr
):  # fmt: skip
    """The weight of the target's class, and the sum of all class weights."""
    target_weight = tl.full((), 1.0, ACC)
    all_weights = vocab.to(ACC)
    if HAS_WEIGHT:
        target_weight = tl.load(weight + y).to(ACC)
        if SMOOTHING:
            all_weights = tl.load(weight_sum)
    return target_weight, all_weights


@triton.jit
def _gradient_factors(
    target_z, target_weight, weight_sum, row_max, sum_exp, log_sum, logprob, coefficient,
    vocab, label_smoothing, z_loss,
):  # fmt: skip
    """(a, b, c): the gradient of the row is a * exp(z - row_max) - b * weight, and c at the target."""
    other_weight = label_smoothing / vocab * weight_sum + 2.0 * z_loss * (row_max + log_sum)
    positive = (1.0 - label_smoothing) * target_weight
    probability = tl.exp(target_z - row_max) / sum_exp
    smooth = label_smoothing / vocab
    at_target = positive * expm1(logprob) + other_weight * probability - smooth * target_weight
    return (positive + other_weight) / sum_exp * coefficient, smooth * coefficient, at_target * coefficient


@triton.jit
def _write(
    grad, at, uncapped, cols, mask, y, row_max, exp_factor, weight_factor, at_target, weight, softcap,
    HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    z = capped(uncapped, mask, softcap, HAS_SOFTCAP)
    g = exp_factor * tl.exp(z - row_max)
    if SMOOTHING:
        if HAS_WEIGHT:
            g -= weight_factor * tl.load(weight + cols, mask, other=0.0).to(z.dtype)
        else:
            g -= weight_factor
    g = tl.where(cols == y, at_target, g)
    if HAS_SOFTCAP:
        g *= cap_slope(uncapped, softcap)
    tl.store(grad + at, g.to(grad.dtype.element_ty), mask)


@triton.jit
def _gradient_start(offset, head, VECTOR: tl.constexpr, GRAD_ALIGNED: tl.constexpr):
    start = offset + head
    if GRAD_ALIGNED:
        start = start // VECTOR * VECTOR
    return start


@triton.jit
def _write_zeros(grad, grad_body, head, length, vocab, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    edge_cols, edge_mask = _edge(head, length, vocab, VECTOR)
    tl.store(grad + edge_cols, tl.zeros((2 * VECTOR,), grad.dtype.element_ty), edge_mask)
    for start in range(0, length, BLOCK):
        at, mask = _tile(start, length, BLOCK, VECTOR)
        tl.store(grad_body + at, tl.zeros((BLOCK,), grad.dtype.element_ty), mask)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def cross_entropy_rows_fwd_kernel(
    logits, target, bias, weight, weight_sum, coefficient,
    loss, row_max_out, sum_exp_out, logprob_out, prediction, entropy, grad,
    vocab, logits_stride, grad_stride, coefficient_stride, ignore_index,
    label_smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64, logit_scale: tl.float64,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr,
    STATS: tl.constexpr, WRITE_GRAD: tl.constexpr, ROWS_ALIGNED: tl.constexpr, GRAD_ALIGNED: tl.constexpr,
    ONE_TILE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = loss.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    offset = row * logits_stride
    body, head, length = _split_row(offset, vocab, VECTOR, ROWS_ALIGNED)
    if WRITE_GRAD:
        grad_offset = row * grad_stride
        grad_body = grad + _gradient_start(grad_offset, head, VECTOR, GRAD_ALIGNED)
    label = tl.load(target + row).to(tl.int64)
    if label == ignore_index:
        tl.store(loss + row, 0.0)
        tl.store(row_max_out + row, 0.0)
        tl.store(sum_exp_out + row, 1.0)
        tl.store(logprob_out + row, 0.0)
        if STATS:
            tl.store(prediction + row, -1)
            tl.store(entropy + row, 0.0)
        if WRITE_GRAD:
            _write_zeros(grad + grad_offset, grad_body, head, length, vocab, BLOCK, VECTOR)
        return

    label_smoothing, z_loss, softcap, logit_scale = converted((label_smoothing, z_loss, softcap, logit_scale), ACC)
    wrong = (label < 0) | (label >= vocab)
    y = tl.where(wrong, 0, label).to(tl.int32)
    row_logits = logits + offset
    target_z = _load_z(row_logits, y, bias, y, y >= 0, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    # Sums of z are relative to z of the target: an offset common to all logits then costs no digits.
    smooth_anchor = tl.where(tl.abs(target_z) < float("inf"), target_z, 0.0)

    edge_cols, edge_mask = _edge(head, length, vocab, VECTOR)
    edge = _load_uncapped(row_logits, edge_cols, bias, edge_cols, edge_mask, logit_scale, HAS_BIAS)
    edge_z = capped(edge, edge_mask, softcap, HAS_SOFTCAP)
    row_max = tl.max(edge_z, 0)
    others = tl.zeros((BLOCK,), ACC)
    moment = tl.zeros((BLOCK if STATS else 1,), ACC)
    smooth = tl.zeros((BLOCK if SMOOTHING else 1,), ACC)
    best = tl.full((BLOCK if STATS else 1,), float("-inf"), ACC)
    best_col = tl.full((BLOCK if STATS else 1,), -1, tl.int32)
    uncapped = others
    if ONE_TILE:
        at, mask = _tile(0, length, BLOCK, VECTOR)
        cols = head + at
        uncapped = _load_uncapped(logits + body, at, bias, cols, mask, logit_scale, HAS_BIAS)
        z = capped(uncapped, mask, softcap, HAS_SOFTCAP)
        row_max, others, moment, smooth, best, best_col = _accumulate(
            z, cols, mask, y, smooth_anchor, weight, row_max, others, moment, smooth, best, best_col,
            STATS, SMOOTHING, HAS_WEIGHT,
        )  # fmt: skip
    else:
        for start in range(0, length, BLOCK):
            at, mask = _tile(start, length, BLOCK, VECTOR)
            cols = head + at
            tile_z = _load_z(logits + body, at, bias, cols, mask, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            row_max, others, moment, smooth, best, best_col = _accumulate(
                tile_z, cols, mask, y, smooth_anchor, weight, row_max, others, moment, smooth, best, best_col,
                STATS, SMOOTHING, HAS_WEIGHT,
            )  # fmt: skip

    # The same expression as in _accumulate, so that the compiler reuses the exponentials of a row in one tile.
    anchor = tl.where(row_max == float("-inf"), 0.0, row_max)
    edge_e, edge_moment, edge_smooth = _sums(
        edge_z, edge_cols, edge_mask, anchor, y, smooth_anchor, weight, STATS, SMOOTHING, HAS_WEIGHT
    )
    sum_exp, log_sum, logprob = log_probability(target_z, row_max, tl.sum(others, 0) + tl.sum(edge_e, 0))

    target_weight, all_weights = _class_weights(weight, weight_sum, y, vocab, ACC, HAS_WEIGHT, SMOOTHING)
    row_loss = -(1.0 - label_smoothing) * target_weight * logprob
    if SMOOTHING:
        to_lse = all_weights * (log_sum + (row_max - smooth_anchor)) - (tl.sum(smooth, 0) + tl.sum(edge_smooth, 0))
        row_loss += label_smoothing / vocab * to_lse
    lse = row_max + log_sum
    row_loss += tl.where(z_loss > 0.0, z_loss * lse * lse, 0.0)

    tl.store(loss + row, tl.where(wrong, float("nan"), row_loss))
    tl.store(row_max_out + row, row_max)
    tl.store(sum_exp_out + row, sum_exp)
    tl.store(logprob_out + row, tl.where(wrong, float("nan"), logprob))
    if STATS:
        shifted = target_z - row_max
        target_term = tl.where(tl.exp(shifted) > 0.0, tl.exp(shifted) * shifted, 0.0)
        expected = (tl.sum(moment, 0) + tl.sum(edge_moment, 0) + target_term) / sum_exp
        tl.store(entropy + row, log_sum - expected)
        edge_best = ranked(edge_z)
        largest = tl.maximum(tl.max(best, 0), tl.max(edge_best, 0))
        lowest = tl.minimum(
            _lowest(best, best_col, best_col >= 0, largest), _lowest(edge_best, edge_cols, edge_mask, largest)
        )
        tl.store(prediction + row, lowest)

    if WRITE_GRAD:
        factor = tl.load(coefficient + row * coefficient_stride).to(ACC)
        exp_factor, weight_factor, at_target = _gradient_factors(
            target_z, target_weight, all_weights, row_max, sum_exp, log_sum, logprob,
            tl.where(wrong, float("nan"), factor), vocab, label_smoothing, z_loss,
        )  # fmt: skip
        _write(
            grad + grad_offset, edge_cols, edge, edge_cols, edge_mask, y, anchor,
            exp_factor, weight_factor, at_target, weight, softcap, HAS_WEIGHT, HAS_SOFTCAP, SMOOTHING,
        )  # fmt: skip
        if ONE_TILE:
            at, mask = _tile(0, length, BLOCK, VECTOR)
            _write(
                grad_body, at, uncapped, head + at, mask, y, anchor, exp_factor, weight_factor, at_target,
                weight, softcap, HAS_WEIGHT, HAS_SOFTCAP, SMOOTHING,
            )  # fmt: skip
        else:
            tiles = tl.cdiv(length, BLOCK)
            for step in range(0, tiles):
                at, mask = _tile((tiles - 1 - step) * BLOCK, length, BLOCK, VECTOR)
                cols = head + at
                tile = _load_uncapped(logits + body, at, bias, cols, mask, logit_scale, HAS_BIAS)
                _write(
                    grad_body, at, tile, cols, mask, y, anchor, exp_factor, weight_factor, at_target,
                    weight, softcap, HAS_WEIGHT, HAS_SOFTCAP, SMOOTHING,
                )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def cross_entropy_rows_bwd_kernel(
    logits, target, bias, weight, weight_sum, coefficient, row_max_in, sum_exp_in, logprob_in, grad,
    vocab, logits_stride, grad_stride, coefficient_stride, ignore_index,
    label_smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64, logit_scale: tl.float64,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr,
    ROWS_ALIGNED: tl.constexpr, GRAD_ALIGNED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = row_max_in.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    offset = row * logits_stride
    body, head, length = _split_row(offset, vocab, VECTOR, ROWS_ALIGNED)
    grad_offset = row * grad_stride
    grad_body = grad + _gradient_start(grad_offset, head, VECTOR, GRAD_ALIGNED)
    label = tl.load(target + row).to(tl.int64)
    if label == ignore_index:
        _write_zeros(grad + grad_offset, grad_body, head, length, vocab, BLOCK, VECTOR)
        return

    label_smoothing, z_loss, softcap, logit_scale = converted((label_smoothing, z_loss, softcap, logit_scale), ACC)
    wrong = (label < 0) | (label >= vocab)
    y = tl.where(wrong, 0, label).to(tl.int32)
    row_logits = logits + offset
    target_z = _load_z(row_logits, y, bias, y, y >= 0, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)

    row_max = tl.load(row_max_in + row)
    sum_exp = tl.load(sum_exp_in + row)
    target_weight, all_weights = _class_weights(weight, weight_sum, y, vocab, ACC, HAS_WEIGHT, SMOOTHING)
    factor = tl.load(coefficient + row * coefficient_stride).to(ACC)
    exp_factor, weight_factor, at_target = _gradient_factors(
        target_z, target_weight, all_weights, row_max, sum_exp, tl.log(sum_exp), tl.load(logprob_in + row),
        tl.where(wrong, float("nan"), factor), vocab, label_smoothing, z_loss,
    )  # fmt: skip
    edge_cols, edge_mask = _edge(head, length, vocab, VECTOR)
    edge = _load_uncapped(row_logits, edge_cols, bias, edge_cols, edge_mask, logit_scale, HAS_BIAS)
    _write(
        grad + grad_offset, edge_cols, edge, edge_cols, edge_mask, y, row_max, exp_factor, weight_factor, at_target,
        weight, softcap, HAS_WEIGHT, HAS_SOFTCAP, SMOOTHING,
    )  # fmt: skip
    for start in range(0, length, BLOCK):
        at, mask = _tile(start, length, BLOCK, VECTOR)
        cols = head + at
        uncapped = _load_uncapped(logits + body, at, bias, cols, mask, logit_scale, HAS_BIAS)
        _write(
            grad_body, at, uncapped, cols, mask, y, row_max, exp_factor, weight_factor, at_target,
            weight, softcap, HAS_WEIGHT, HAS_SOFTCAP, SMOOTHING,
        )  # fmt: skip
