"""The training benchmark in PyTorch with sparse gradients; runs in an environment of its own, without Penstock.

The tower, the loss, the rows, the negatives' distribution and the optimizers are those of `benchmarks.recall_speed`.
Prints a line of JSON: milliseconds of each measured step, and the mean loss of the last ten.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from recall_data import BATCH, DIM, FIRST, HIDDEN, LEARNING_RATE, SAMPLE, Made
from torch import nn
from torch.nn import functional


class YouTubeDNN(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.history = nn.Embedding(size, DIM, padding_idx=0, sparse=True)
        nn.init.uniform_(self.history.weight, -0.05, 0.05)
        with torch.no_grad():
            self.history.weight[0] = 0.0
        self.items = nn.Embedding(size, DIM + 1, sparse=True)
        nn.init.trunc_normal_(self.items.weight, std=DIM**-0.5)
        with torch.no_grad():
            self.items.weight[:, DIM] = 0.0
        widths = (DIM, *HIDDEN)
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        self.tower = nn.Sequential(*layers, nn.Linear(widths[-1], DIM))

    def forward(self, history: torch.Tensor, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # nn.EmbeddingBag took twice the time of this
        counts = (history != 0).sum(dim=1, keepdim=True).clamp(min=1)
        user = self.tower(self.history(history).sum(dim=1) / counts)
        return torch.cat([user, torch.ones_like(user[:, :1])], dim=1), self.items(items)


def loss_of(
    query: torch.Tensor, vectors: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, log_q: torch.Tensor
) -> torch.Tensor:
    of_positives, of_negatives = vectors[: len(positives)], vectors[len(positives) :]
    positive = (query * of_positives).sum(dim=1) - log_q[positives]
    negative = torch.addmm(-log_q[negatives], query, of_negatives.T)
    # quicker than masked_fill of the whole, and one cross_entropy than logsumexp
    negative[(negatives[None, :] == positives[:, None]).nonzero(as_tuple=True)] = -1e9
    logits = torch.cat([positive[:, None], negative], dim=1)
    return functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def main(folder: Path, optimizer: str, warm_up: int, steps: int) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":  # of the CPU it would cost each operation a look
        torch.set_default_device(device)
    made = Made.read(folder)
    history, positives = torch.from_numpy(made.history), torch.from_numpy(made.positives)
    keep, alias = torch.from_numpy(made.keep).float().to(device), torch.from_numpy(made.alias).to(device)
    log_q = torch.from_numpy(made.log_q).to(device) + torch.log(torch.tensor(float(SAMPLE)))
    model = YouTubeDNN(made.vocabulary + FIRST)
    tables = [model.history.weight, model.items.weight]
    rate = LEARNING_RATE[optimizer]
    if optimizer == "adagrad":
        optimizers = [torch.optim.Adagrad(model.parameters(), rate)]
    else:
        optimizers = [torch.optim.SparseAdam(tables, rate), torch.optim.Adam(model.tower.parameters(), rate)]
    milliseconds, losses = [], []
    for step in range(warm_up + steps):
        started = time.perf_counter()
        rows = slice(step * BATCH, (step + 1) * BATCH)
        read, wanted = history[rows].to(device), positives[rows].to(device)
        column = torch.randint(made.vocabulary, (SAMPLE,), dtype=torch.int32)
        negatives = torch.where(torch.rand(SAMPLE) < keep[column], column, alias[column]) + FIRST
        query, vectors = model(read, torch.cat([wanted, negatives]))
        loss = loss_of(query, vectors, wanted, negatives, log_q)
        for one in optimizers:
            one.zero_grad(set_to_none=True)
        loss.backward()
        for one in optimizers:
            one.step()
        losses.append(loss.item())
        milliseconds.append(1000 * (time.perf_counter() - started))
    print(json.dumps({"milliseconds": milliseconds[warm_up:], "loss": sum(losses[-10:]) / len(losses[-10:])}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
