"""A step of transformers' BertForMaskedLM with the sizes of BERT-base, as it is and patched; needs transformers.

    python -m benchmarks.masked_lm benchmarks/results/transformers_masked_lm.md

The encoder has one layer, so that the head can be seen: 4 sequences of 512 tokens, of which 15 % are masked, one
thread, float32. Each case is a process of its own, since the allocator keeps what a case before it freed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import sslkernels as sk
from benchmarks import environment
from benchmarks.memory import peak_extra

CASES = {"as it is": None, "patched": {"compact": True}, "patched, compact=False": {"compact": False}}
STEPS = 5


def measured(case: str) -> tuple[float, float, float]:
    """(median CPU seconds of a step, peak of its memory in MB above model and inputs, loss)."""
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = transformers.BertForMaskedLM(config).train()
    ids = torch.randint(1000, config.vocab_size, (4, 512))
    masked = sk.mask_tokens(ids, mask_id=103, vocab_size=config.vocab_size, special_ids=(0, 101, 102), seed=0)
    options = CASES[case]
    if options is not None:
        sk.integrations.transformers.patch(model, **options)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=masked.input_ids, labels=masked.labels).loss
        loss.backward()
        return loss.item()

    step()
    model.zero_grad(set_to_none=True)
    peak, loss = peak_extra(step, torch.device("cpu"))
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), (peak or float("nan")) / 1e6, loss


def report() -> str:
    machine = environment.describe(torch.device("cpu"))
    lines = [
        "# A step of BertForMaskedLM, without and with sslkernels",
        "",
        f"- {machine['cpu']}, one thread, {machine['date']}, commit {machine['commit']}",
        f"- torch {machine['torch']}, transformers {environment.version('transformers')}",
        "- sizes of BERT-base with one layer, 4 x 512 tokens, 15 % masked, float32, forward and backward",
        f"- median of {STEPS}; memory is the peak above model and inputs",
        "",
        "| | CPU seconds | peak MB | loss |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.masked_lm", "--case", case]
        lines.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split("\n")[-1])
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        seconds, peak, loss = measured(sys.argv[2])
        print(f"| {sys.argv[2]} | {seconds:.2f} | {peak:.0f} | {loss:.5f} |")
    else:
        Path(sys.argv[1]).write_text(report())
