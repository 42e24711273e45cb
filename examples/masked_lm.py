"""Masked-token prediction: a small BERT reads the docstrings of the Python on this disk and fills in what is hidden.

    pip install sslkernels rich tokenizers matplotlib
    python examples/masked_lm.py [--prompt "Return the [MASK] of the list."]

The labels come from the data (`mask_tokens`), and the loss over 30,000 subwords never materialises its logits
(`linear_cross_entropy` on the tied embedding and a bias): rows that are not masked cost nothing. At the end time and
peak memory of the head are measured, with and without it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import random
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from python_sources import Pair, collect_pairs, train_tokenizer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn

import sslkernels as sk

VOCAB, DIM, LENGTH = 30_000, 128, 32
MASK, SEPARATOR = 2, 3
PROMPTS = (
    "Return the number [MASK] elements.",
    "This is [MASK] by default.",
    "Convert a [MASK] to a string.",
    "Raise an [MASK] if the file is missing.",
)
console = Console()


class Bert(nn.Module):
    """A transformer whose input is mixed with its neighbours by a convolution, so that a minute is enough to learn from
    them; the bias of its head starts at how often each token occurs.
    """

    def __init__(self, log_share: Tensor, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, DIM)
        nn.init.normal_(self.tokens.weight, std=0.05)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, DIM))
        layer = nn.TransformerEncoderLayer(DIM, 4, 4 * DIM, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.neighbours = nn.Conv1d(DIM, DIM, 5, padding=2)
        self.bias = nn.Parameter(log_share.clone())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        return self.layers(x + self.neighbours(x.mT).mT)


class Curve(NamedTuple):
    steps: list[int]
    loss: list[float]
    accuracy: list[float]


def prose(pairs: Iterable[Pair]) -> list[str]:
    """The paragraphs of the docstrings that are sentences, each once: no examples, no tables."""
    paragraphs = {" ".join(part.split()) for pair in pairs for part in pair.docstring.split("\n\n")}
    return sorted(
        text
        for text in paragraphs
        if text.endswith(".") and text.count(" ") > 2 and not {">>>", "---"} & {*text.split()}
    )


def rows_of_tokens(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """(rows, LENGTH) the texts one after another, a separator behind each."""
    stream = [token for encoding in tokenizer.encode_batch(texts) for token in (*encoding.ids, SEPARATOR)]
    rows = len(stream) // LENGTH
    return torch.tensor(stream[: rows * LENGTH]).view(rows, LENGTH)


def unigram(ids: Tensor) -> tuple[Tensor, float]:
    """Logarithm of how often each token occurs, and the entropy in nats: the loss of a model that knows no more."""
    count = torch.bincount(ids[ids != SEPARATOR], minlength=VOCAB).double()
    share = count / count.sum()
    entropy = -(share * share.clamp_min(1e-30).log()).sum().item()
    return ((count + 1) / (count + 1).sum()).log().float(), entropy


def masked(ids: Tensor, **options) -> sk.MaskedTokens:
    return sk.mask_tokens(ids, mask_id=MASK, vocab_size=VOCAB, special_ids=(0, 1, MASK, SEPARATOR), **options)


def train(model: Bert, ids: Tensor, steps: int, batch: int) -> Curve:
    device = model.bias.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    curve = Curve([], [], [])
    for step in track(range(1, steps + 1), "training", console=console):
        part = masked(ids[torch.randint(len(ids), (batch,))].to(device), probability=0.2)
        loss, stats = sk.linear_cross_entropy(
            model(part.input_ids), model.tokens.weight, part.labels, linear_bias=model.bias, return_stats=True
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.steps.append(step)
        curve.loss.append(loss.item())
        curve.accuracy.append((stats.correct.sum() / (part.labels != -100).sum()).item())
    return curve


@torch.no_grad()
def on_held_out(model: Bert, ids: Tensor) -> tuple[float, float]:
    """(loss, share of the hidden tokens that it fills in right)."""
    part = masked(ids.to(model.bias.device), probability=0.2, seed=0)
    loss, stats = sk.linear_cross_entropy(
        model(part.input_ids), model.tokens.weight, part.labels, linear_bias=model.bias, return_stats=True
    )
    return loss.item(), (stats.correct.sum() / (part.labels != -100).sum()).item()


@torch.no_grad()
def fill_in(model: Bert, tokenizer: Tokenizer, prompt: str) -> None:
    ids = torch.tensor([[SEPARATOR, *tokenizer.encode(prompt).ids, SEPARATOR]], device=model.bias.device)
    hidden = model(ids)[ids == MASK]
    for logits in F.linear(hidden, model.tokens.weight, model.bias):
        probability, index = logits.softmax(-1).topk(5)
        words = zip(index.tolist(), probability.tolist(), strict=True)
        shown = ", ".join(f"{tokenizer.id_to_token(i)} {p:.0%}" for i, p in words)
        console.print(f"{prompt}  ->  {shown}", markup=False)


def resident(key: str) -> float | None:
    """Megabytes of this process: "VmRSS" now, "VmHWM" at the peak. None where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) / 1e3
    return None


def cost(call: Callable[[], Tensor], device: torch.device) -> tuple[float, float | None, Tensor]:
    """(seconds, megabytes at the peak beyond those before, result)."""
    before: float | None = 0.0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
    else:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what is free is taken anew, and counts
            Path("/proc/self/clear_refs").write_text("5")  # the peak is the present
        before, peak = resident("VmRSS"), resident("VmHWM")
        if before is None or peak is None or peak - before > 16:  # some sandboxes do not reset it
            before = None
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else resident("VmHWM")
    return seconds, None if peak is None or before is None else peak - before, result


def head_against_torch(model: Bert, ids: Tensor) -> dict[str, float | None]:
    """Prints what forward and backward of the head cost; returns the megabytes at their peaks."""
    device = model.bias.device
    part = masked(ids.to(device), probability=0.15, seed=1)
    hidden = model(part.input_ids).detach()
    embedding, bias = model.tokens.weight.detach(), model.bias.detach()

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w, b).flatten(0, 1), part.labels.flatten())

    def fused(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return sk.linear_cross_entropy(x, w, part.labels, linear_bias=b)

    def step(head: Callable[[Tensor, Tensor, Tensor], Tensor], leaves: list[Tensor]) -> Tensor:
        loss = head(*leaves)
        loss.backward()
        return loss.detach()

    table = Table(
        "head", "loss", "seconds", "peak memory", title=f"{ids.numel():,} tokens, {VOCAB:,} subwords, 15 % hidden"
    )
    peaks: dict[str, float | None] = {}
    for name, head in (("F.linear, F.cross_entropy", plain), ("sk.linear_cross_entropy", fused)):
        for _ in range(2):  # the first call warms up
            leaves = [values.clone().requires_grad_() for values in (hidden, embedding, bias)]
            seconds, peaks[name], loss = cost(partial(step, head, leaves), device)
        shown = "unknown here" if peaks[name] is None else f"{peaks[name]:,.0f} MB"
        table.add_row(name, f"{loss.item():.4f}", f"{seconds:.2f}", shown)
    console.print(table)
    return peaks


def plot(curve: Curve, entropy: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def smooth(values: list[float], width: int = 20) -> list[float]:
        return [sum(values[max(i - width, 0) : i + 1]) / (i - max(i - width, 0) + 1) for i in range(len(values))]

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(curve.steps, smooth(curve.loss), label="loss of the hidden tokens")
    left.axhline(entropy, color="black", linestyle="--", label="entropy of the tokens without context")
    left.set(xlabel="step", ylabel="nats a token", title="A small BERT on docstrings")
    left.legend(loc="upper right", bbox_to_anchor=(1.0, 0.84))  # below the line of the entropy
    right.plot(curve.steps, [100 * value for value in smooth(curve.accuracy)], color="C2")
    right.set(xlabel="step", ylabel="% of the hidden tokens", title=f"Filled in right, of {VOCAB:,} subwords")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    console.print(f"plot: {path}")


def main() -> tuple[float, float, dict[str, float | None]]:
    """(loss of held-out docstrings, unigram entropy), in nats a token, and the megabytes of the head by its name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64, help=f"rows of {LENGTH} tokens")
    parser.add_argument("--standard-library", action="store_true", help="leave out the installed packages: quicker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", action="append", help="a sentence with [MASK] in it")
    parser.add_argument("--output", type=Path, default=Path("build/examples"), help="folder of the plot")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = collect_pairs(not options.standard_library)
    texts = prose(pairs)
    random.Random(options.seed).shuffle(texts)
    tokenizer = train_tokenizer((pair.docstring for pair in pairs), VOCAB)
    ids = rows_of_tokens(tokenizer, texts)
    held_out, ids = ids[:500], ids[500:]
    log_share, entropy = unigram(ids)
    console.print(
        f"{len(texts):,} paragraphs, {ids.numel():,} tokens of {tokenizer.get_vocab_size():,} subwords, "
        f"unigram entropy {entropy:.2f} nats"
    )

    model = Bert(log_share).to(device)
    curve = train(model, ids, options.steps, options.batch)
    loss, right = on_held_out(model, held_out)
    console.print(
        f"held out: {loss:.2f} nats a hidden token, {entropy:.2f} without context; {right:.0%} filled in right"
    )
    plot(curve, entropy, options.output / "masked_lm.png")
    for prompt in options.prompt or PROMPTS:
        fill_in(model, tokenizer, prompt)
    return loss, entropy, head_against_torch(model, ids[:64])


if __name__ == "__main__":
    main()
