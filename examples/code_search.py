"""Search the Python on your own disk: two encoders learn which docstring describes which code.

    pip install sslkernels rich tokenizers matplotlib
    python examples/code_search.py                          # trains, then asks what you look for
    python examples/code_search.py --query "shortest path"  # trains, answers, ends
    python examples/code_search.py --pretrain 100           # first learns its words from their neighbours

The data are the functions and classes of the standard library and of the installed packages. A docstring and its code
are a pair, all others in the batch are negatives (CLIP's loss), and a batch is as large as the data allow: the scores
of 4,096 x 4,096 pairs are never materialised. Overloads and copies share a docstring or a code; `ids` keep them from
being each other's negatives.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from python_sources import Pair, collect_pairs, train_tokenizer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn

import sslkernels as sk

VOCAB, DIM, FEATURES = 30_000, 256, 256
WORDS_OF_TEXT, WORDS_OF_CODE = 48, 160
HELD_OUT = 1000
MASK, SEPARATOR = 2, 3
console = Console()


class Encoder(nn.Module):
    """A weighted bag of subwords: the weight of a subword is learned, as TF-IDF would count it."""

    def __init__(self, words: nn.Embedding, weights: nn.Embedding) -> None:
        super().__init__()
        self.words, self.weights = words, weights  # both encoders share them
        self.head = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, FEATURES))

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.weights(ids).squeeze(-1).exp() * (ids > 0)
        weight = weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-6)
        bag = nn.functional.embedding_bag(ids, self.words.weight, per_sample_weights=weight, mode="sum")
        return bag + self.head(bag)


class Search(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        words, weights = nn.Embedding(VOCAB, DIM), nn.Embedding(VOCAB, 1)
        nn.init.normal_(words.weight, std=DIM**-0.5)
        nn.init.zeros_(weights.weight)
        self.text, self.code = Encoder(words, weights), Encoder(words, weights)


class Data(NamedTuple):
    """Ids of the subwords of the summaries (N, WORDS_OF_TEXT) and of the code (N, WORDS_OF_CODE), 0 for padding;
    ids (N,): equal for pairs with the same summary or the same code."""

    text: Tensor
    code: Tensor
    ids: Tensor

    def rows(self, index: Tensor | slice) -> Data:
        return Data(*(values[index] for values in self))


def encode(tokenizer: Tokenizer, texts: list[str], length: int) -> Tensor:
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


def duplicates(pairs: list[Pair]) -> Tensor:
    """(N,) a number for each pair, equal where the summary or the code is."""
    first_with: dict[str, int] = {}
    return torch.tensor(
        [min(first_with.setdefault(part, i) for part in (pair.summary, pair.code)) for i, pair in enumerate(pairs)]
    )


def pretrain(model: Search, data: Data, steps: int, device: torch.device, batch: int = 128) -> None:
    """Masked-token prediction over docstrings and code: each word from the two before and the two behind it."""
    words = model.text.words
    reader = nn.Sequential(nn.Conv1d(DIM, DIM, 5, padding=2), nn.GELU(), nn.Conv1d(DIM, DIM, 1)).to(device)
    bias = nn.Parameter(torch.zeros(VOCAB, device=device))
    optimizer = torch.optim.AdamW([words.weight, *reader.parameters(), bias], lr=2e-3)
    for step in track(range(steps), "learning words", console=console):
        ids = (data.code if step % 2 else data.text)[torch.randint(len(data.ids), (batch,)), :WORDS_OF_TEXT].to(device)
        part = sk.mask_tokens(ids, mask_id=MASK, vocab_size=VOCAB, special_ids=(0, 1, MASK, SEPARATOR))
        hidden = reader(words(part.input_ids).mT).mT
        loss = sk.linear_cross_entropy(hidden, words.weight, part.labels, linear_bias=bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if steps:
        console.print(f"loss of the hidden words after {steps} steps: {loss.item():.2f}")


def train(model: Search, data: Data, epochs: int, batch: int, held_out: Data, device: torch.device) -> list[dict]:
    loss_of = sk.nn.ClipLoss(normalize=True, init_logit_scale=20.0).to(device)
    optimizer = torch.optim.AdamW([*model.parameters(), *loss_of.parameters()], lr=3e-3, weight_decay=0.01)
    steps = max(len(data.ids) // batch, 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs * steps, pct_start=0.1)
    history = [{"seconds": 0.0, "epoch": 0, "loss": float("nan"), **recall(model, held_out, device)}]
    start = time.perf_counter()
    for epoch in track(range(epochs), "training", console=console):
        for rows in torch.randperm(len(data.ids))[: steps * batch].view(steps, -1):
            part = Data(*(values.to(device) for values in data.rows(rows)))
            keep = torch.rand(part.code.shape, device=device) > 0.3  # code is still itself with words left out
            loss = loss_of(model.text(part.text), model.code(part.code * keep), ids=part.ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found = recall(model, held_out, device)
        history.append({"seconds": time.perf_counter() - start, "epoch": epoch + 1, "loss": loss.item(), **found})
    return history


@torch.no_grad()
def recall(model: Search, data: Data, device: torch.device) -> dict[str, float]:
    """How often the code of a docstring is first, and among the first ten, of all held-out code."""
    text, code = features(model.text, data.text, device), features(model.code, data.code, device)
    rank = (text @ code.t()).argsort(1, descending=True).argsort(1).diagonal()
    return {"recall@1": (rank < 1).float().mean().item(), "recall@10": (rank < 10).float().mean().item()}


@torch.no_grad()
def features(encoder: Encoder, ids: Tensor, device: torch.device) -> Tensor:
    return nn.functional.normalize(torch.cat([encoder(part.to(device)) for part in ids.split(4096)]), dim=1)


def answer(model: Search, tokenizer: Tokenizer, pairs: list[Pair], code: Tensor, query: str) -> None:
    text = features(model.text, encode(tokenizer, [query], WORDS_OF_TEXT), code.device)
    scores, rows = (code @ text[0]).topk(min(8, len(pairs)))
    table = Table("score", "where", "summary", title=query)
    for score, row in zip(scores.tolist(), rows.tolist(), strict=True):
        table.add_row(f"{score:.2f}", pairs[row].name, pairs[row].summary[:90])
    console.print(table)


def plot(history: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    seconds = [entry["seconds"] for entry in history]
    for name in ("recall@10", "recall@1"):
        axes.plot(seconds, [100 * entry[name] for entry in history], marker="o", label=name)
    axes.set(xlabel="seconds of training", ylabel="% of 1,000 held-out docstrings", ylim=(0, 100))
    axes.set_title("The right code among 1,000, from its docstring")
    axes.annotate(f"{100 * history[-1]['recall@10']:.0f} %", (seconds[-1], 100 * history[-1]["recall@10"]), (0, 6),
                  textcoords="offset points", ha="center")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    console.print(f"plot: {path}")


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument(
        "--pretrain", type=int, default=0, metavar="STEPS", help="steps of masked-token prediction before"
    )
    parser.add_argument("--standard-library", action="store_true", help="leave out the installed packages: quicker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--query", action="append", help="what to look for; without, the terminal asks")
    parser.add_argument("--output", type=Path, default=Path("build/examples"), help="folder of the plot")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = collect_pairs(not options.standard_library)
    tokenizer = train_tokenizer((text for pair in pairs for text in (pair.summary, pair.code[:1000])), VOCAB)
    summaries, codes = [pair.summary for pair in pairs], [pair.code for pair in pairs]
    data = Data(encode(tokenizer, summaries, WORDS_OF_TEXT), encode(tokenizer, codes, WORDS_OF_CODE), duplicates(pairs))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(options.seed))
    # Held out: pairs without a duplicate, each of which has one right answer.
    single = torch.bincount(data.ids, minlength=len(pairs))[data.ids[order]] == 1
    held_out = order[single][:HELD_OUT]
    kept = torch.ones(len(pairs), dtype=torch.bool).index_fill(0, held_out, False)
    console.print(f"{len(pairs):,} pairs of docstring and code, {kept.sum():,} to learn from")

    model = Search().to(device)
    batch = min(options.batch, int(kept.sum()))
    pretrain(model, data.rows(kept), options.pretrain, device)
    history = train(model, data.rows(kept), options.epochs, batch, data.rows(held_out), device)
    table = Table("epoch", "seconds", "loss", "recall@1", "recall@10")
    for entry in history:
        table.add_row(
            str(entry["epoch"]), f"{entry['seconds']:.0f}", f"{entry['loss']:.2f}",
            f"{entry['recall@1']:.1%}", f"{entry['recall@10']:.1%}",
        )  # fmt: skip
    console.print(table)
    plot(history, options.output / "code_search.png")

    code = features(model.code, data.code, device)
    for query in options.query or []:
        answer(model, tokenizer, pairs, code, query)
    while not options.query and sys.stdin.isatty():
        query = console.input("what do you look for? (nothing: end) ")
        if not query.strip():
            break
        answer(model, tokenizer, pairs, code, query)
    return history[-1]["recall@10"]


if __name__ == "__main__":
    main()
