"""The rank training benchmark in PyTorch; runs in an environment of its own, without Penstock.

The net, the losses, the rows and the optimizer are those of `benchmarks.rank_speed`. `written` is MMoE as it is
usually written: a module an expert, gradients as large as the tables, Adam over all of them. `tuned` is what was
quickest here: one product for all experts, one for all gates and one for all towers, gradients of the rows that were
met, and SparseAdam for these. Prints a line of JSON: milliseconds of each measured step, and the mean loss of the last
ten.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from rank_data import (
    BATCH,
    DIM,
    DROPOUT,
    EMBEDDING_SCALE,
    EXPERT_UNITS,
    EXPERTS,
    GATE_DROPOUT,
    LEARNING_RATE,
    MATCH,
    NUMBERS,
    SIDES,
    TASKS,
    TOWER_UNITS,
    Made,
)
from torch import nn
from torch.nn import functional


class Join(nn.Module):
    """Embeddings and numbers of each side, and the product of user and item."""

    def __init__(self, made: Made, sparse: bool) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.Embedding(size, DIM, sparse=sparse) for name, size in made.sizes.items()})
        for table in self.tables.values():
            nn.init.uniform_(table.weight, -EMBEDDING_SCALE, EMBEDDING_SCALE)
        self.ids = {side: made.of(side, "id", "ids") for side in SIDES}
        counts = {side: DIM * len(self.ids[side]) + len(made.of(side, *NUMBERS)) for side in SIDES}
        self.match = nn.ModuleDict({side: linear(counts[side], MATCH) for side in ("user", "item")})
        self.width = sum(counts.values()) + MATCH

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        sides = {}
        for side, columns in self.ids.items():
            vectors = [self.vector(self.tables[column.vocabulary], inputs[column.name]) for column in columns]
            sides[side] = torch.cat([*vectors, inputs[f"numbers of {side}"]], dim=1)
        product = self.match["user"](sides["user"]) * self.match["item"](sides["item"])
        return torch.cat([*sides.values(), product], dim=1)

    def vector(self, table: nn.Embedding, indices: torch.Tensor) -> torch.Tensor:
        if indices.ndim == 1:
            return table(indices)
        return functional.embedding_bag(indices, table.weight, mode="mean", sparse=table.sparse, padding_idx=0)


class Written(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = EXPERT_UNITS
        self.experts = nn.ModuleList(
            nn.Sequential(
                *(linear(width, first), nn.ReLU(), nn.Dropout(DROPOUT)),
                *(linear(first, second), nn.ReLU(), nn.Dropout(DROPOUT)),
            )
            for _ in range(EXPERTS)
        )
        self.gates = nn.ModuleList(linear(width, EXPERTS, bias=False) for _ in TASKS)
        self.towers = nn.ModuleList(
            nn.Sequential(linear(second, TOWER_UNITS), nn.ReLU(), linear(TOWER_UNITS, 1)) for _ in TASKS
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        logits = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            shares = torch.softmax(dropped(gate(x)), dim=1)
            logits.append(tower((shares[:, :, None] * outputs).sum(dim=1)))
        return torch.cat(logits, dim=1)


class Tuned(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = EXPERT_UNITS
        tasks = len(TASKS)
        self.bottom = nn.Linear(width, EXPERTS * first + tasks * EXPERTS)
        with torch.no_grad():
            self.bottom.weight.copy_(
                torch.cat(
                    [linear(width, first).weight for _ in range(EXPERTS)]
                    + [linear(width, EXPERTS, bias=False).weight for _ in range(tasks)]
                )
            )
            self.bottom.bias.zero_()
        self.experts = stacked(EXPERTS, first, second)
        self.towers = stacked(tasks, second, TOWER_UNITS)
        self.heads = stacked(tasks, TOWER_UNITS, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.bottom(x)
        split = EXPERTS * EXPERT_UNITS[0]
        hidden = functional.dropout(torch.relu(both[:, :split]), DROPOUT).view(len(x), EXPERTS, -1).transpose(0, 1)
        outputs = functional.dropout(torch.relu(torch.baddbmm(self.experts[1], hidden, self.experts[0])), DROPOUT)
        shares = torch.softmax(dropped(both[:, split:].reshape(-1, EXPERTS)), dim=1).view(len(x), -1, EXPERTS)
        mixed = torch.bmm(shares, outputs.transpose(0, 1)).transpose(0, 1)
        towers = torch.relu(torch.baddbmm(self.towers[1], mixed, self.towers[0]))
        return torch.baddbmm(self.heads[1], towers, self.heads[0]).squeeze(2).T


def linear(inputs: int, units: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, units, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def stacked(count: int, inputs: int, units: int) -> nn.ParameterList:
    kernels = torch.stack([linear(inputs, units).weight.detach().T for _ in range(count)])
    return nn.ParameterList([nn.Parameter(kernels), nn.Parameter(torch.zeros(count, 1, units))])


def dropped(logits: torch.Tensor) -> torch.Tensor:
    """Each expert left out of a gate with a probability; a row that lost all keeps them all."""
    kept = torch.rand_like(logits) >= GATE_DROPOUT
    kept |= ~kept.any(dim=1, keepdim=True)
    return torch.where(kept, logits, -1e9)


def main(form: str, folder: Path, warm_up: int, steps: int) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":  # of the CPU it would cost each operation a look
        torch.set_default_device(device)
    made = Made.read(folder)
    ids = [column.name for side in SIDES for column in made.of(side, "id", "ids")]
    inputs = {name: torch.from_numpy(made.inputs[name]) for name in ids}
    for side in SIDES:
        numbers = [torch.from_numpy(made.inputs[column.name]) for column in made.of(side, *NUMBERS)]
        inputs[f"numbers of {side}"] = torch.stack(numbers, dim=1)
    labels = torch.stack([torch.from_numpy(made.labels[task]) for task in TASKS], dim=1)
    join = Join(made, sparse=form == "tuned")
    net = Tuned(join.width) if form == "tuned" else Written(join.width)
    if form == "tuned":
        rest = [*join.match.parameters(), *net.parameters()]
        optimizers = [
            torch.optim.SparseAdam(join.tables.parameters(), LEARNING_RATE),
            torch.optim.Adam(rest, LEARNING_RATE, fused=True),
        ]
    else:
        optimizers = [torch.optim.Adam([*join.parameters(), *net.parameters()], LEARNING_RATE)]
    order = torch.randperm(len(labels), device="cpu")
    milliseconds, losses = [], []
    for step in range(warm_up + steps):
        started = time.perf_counter()
        rows = order[step * BATCH : (step + 1) * BATCH]
        logits = net(join({name: values[rows].to(device) for name, values in inputs.items()}))
        loss = functional.binary_cross_entropy_with_logits(logits, labels[rows].to(device), reduction="sum") / BATCH
        for one in optimizers:
            one.zero_grad(set_to_none=True)
        loss.backward()
        for one in optimizers:
            one.step()
        losses.append(loss.item())
        milliseconds.append(1000 * (time.perf_counter() - started))
    print(json.dumps({"milliseconds": milliseconds[warm_up:], "loss": sum(losses[-10:]) / len(losses[-10:])}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
