"""SASRec in plain PyTorch: the steps that `benchmarks.sequence_speed` measures in an environment of its own.

As it is commonly written: `nn.MultiheadAttention`, dense gradients, Adam, padding in front whose states are zero, and
`cross_entropy` over all logits of the places that have an item.
Prints a line of JSON: milliseconds of each measured step, the mean loss of the last ten, and the peak of memory in MB.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from sequence_data import BATCH, BLOCKS, DIM, DROPOUT, FIRST, HEADS, LEARNING_RATE, LENGTH, SAMPLE, Histories
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, DROPOUT, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(DIM, eps=1e-6) for _ in range(2)])
        self.network = nn.Sequential(
            nn.Linear(DIM, DIM), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(DIM, DIM), nn.Dropout(DROPOUT)
        )
        self.register_buffer("later", torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        read = self.norms[0](states)
        states = states + self.attention(read, read, read, attn_mask=self.later, need_weights=False)[0]
        return states + self.network(self.norms[1](states))


class SASRec(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.items, self.places = nn.Embedding(size, DIM, padding_idx=0), nn.Embedding(LENGTH, DIM)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.dropout, self.norm = nn.Dropout(DROPOUT), nn.LayerNorm(DIM, eps=1e-6)
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        present = (items != 0)[..., None]
        states = self.dropout(self.items(items) * DIM**0.5 + self.places.weight) * present
        for block in self.blocks:
            states = block(states) * present
        return self.norm(states)


def full(model: SASRec, states: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over all items."""
    logits = states @ model.items.weight[FIRST:].T
    return functional.cross_entropy(logits, following - FIRST)


def sampled(model: SASRec, states: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the positive and shared negatives, drawn uniformly."""
    negatives = torch.randint(FIRST, model.items.num_embeddings, (SAMPLE,))
    positive = (states * model.items(following)).sum(dim=1)
    negative = states @ model.items(negatives).T
    negative = negative.masked_fill(negatives[None, :] == following[:, None], -1e9)
    # all were drawn alike: there is nothing to correct
    logits = torch.cat([positive[:, None], negative], dim=1)
    return functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def main(folder: Path, loss: str, warm_up: int, steps: int) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    made = Histories.read(folder)
    items = torch.from_numpy(made.items).long()
    model = SASRec(made.vocabulary + FIRST)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    loss_of = {"full": full, "sampled": sampled}[loss]
    milliseconds, losses = [], []
    for step in range(warm_up + steps):
        started = time.perf_counter()
        batch = items[step * BATCH : (step + 1) * BATCH]
        there = batch[:, :-1] != 0
        value = loss_of(model, model(batch[:, :-1])[there], batch[:, 1:][there])
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        losses.append(value.item())
        milliseconds.append(1000 * (time.perf_counter() - started))
    print(
        json.dumps(
            {
                "milliseconds": milliseconds[warm_up:],
                "loss": sum(losses[-10:]) / len(losses[-10:]),
                "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
