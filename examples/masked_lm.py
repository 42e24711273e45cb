"""Masked-token prediction: a small BERT reads the docstrings of the Python on this disk and fills in what is hidden.

    pip install sslkernels rich tokenizers matplotlib
    python examples/masked_lm.py [--prompt "Return the [MASK] of the list."]

The labels come from the data (`mask_tokens`), and the loss over 8,192 subwords never materialises its logits
(`linear_cross_entropy` on the tied embedding and a bias): rows that are not masked cost nothing. At the end the head is
timed beside plain PyTorch, with the memory that each takes.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from python_sources import collect_pairs, train_tokenizer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn

import sslkernels as sk

VOCAB, DIM, LENGTH = 8_192, 128, 32
MASK, SEPARATOR = 2, 3
PROMPTS = (
    "Return the number [MASK] elements.",
    "Test [MASK] this works.",
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
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


def head_against_torch(model: Bert, ids: Tensor) -> Table:
    """Time of the head's forward and backward, and of the logits that it does not make."""
    part = masked(ids.to(model.bias.device), probability=0.15, seed=1)
    hidden = model(part.input_ids).detach()
    embedding, bias = model.tokens.weight.detach(), model.bias.detach()

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w, b).flatten(0, 1), part.labels.flatten())

    def fused(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return sk.linear_cross_entropy(x, w, part.labels, linear_bias=b)

    table = Table("head", "loss", "seconds", "logits", title=f"{ids.numel():,} tokens, {VOCAB:,} subwords")
    for name, head in (("F.linear, F.cross_entropy", plain), ("sk.linear_cross_entropy", fused)):
        for _ in range(2):  # the first call warms up
            leaves = [values.clone().requires_grad_() for values in (hidden, embedding, bias)]
            start = time.perf_counter()
            loss = head(*leaves)
            loss.backward()
            if loss.is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        size = f"{2 * 4 * ids.numel() * VOCAB / 1e6:,.0f} MB with their gradient" if head is plain else "never made"
        table.add_row(name, f"{loss.item():.4f}", f"{seconds:.2f}", size)
    return table


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


def main() -> tuple[float, float]:
    """(loss of held-out docstrings, unigram entropy), in nats a token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64, help=f"rows of {LENGTH} tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", action="append", help="a sentence with [MASK] in it")
    parser.add_argument("--output", type=Path, default=Path("build/examples"), help="folder of the plot")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = sorted({pair.summary for pair in collect_pairs()})
    random.Random(options.seed).shuffle(texts)
    tokenizer = train_tokenizer(texts, VOCAB)
    ids = rows_of_tokens(tokenizer, texts)
    held_out, ids = ids[:500], ids[500:]
    log_share, entropy = unigram(ids)
    console.print(f"{len(texts):,} docstrings, {ids.numel():,} tokens, unigram entropy {entropy:.2f} nats")

    model = Bert(log_share).to(device)
    curve = train(model, ids, options.steps, options.batch)
    loss, right = on_held_out(model, held_out)
    console.print(
        f"held out: {loss:.2f} nats a hidden token, {entropy:.2f} without context; {right:.0%} filled in right"
    )
    plot(curve, entropy, options.output / "masked_lm.png")
    for prompt in options.prompt or PROMPTS:
        fill_in(model, tokenizer, prompt)
    console.print(head_against_torch(model, ids[:64]))
    return loss, entropy


if __name__ == "__main__":
    main()
