"""The assignment problem: whom to pair with whom so that the sum over all pairs is largest."""

from __future__ import annotations

import numpy as np
import torch


def assign(gain_NN: torch.Tensor) -> torch.Tensor:
    """The column (N, each once) for each row that makes the sum of `gain_NN[row, column]` largest.

    Shortest augmenting paths with row and column prices (Jonker & Volgenant 1987, "A shortest augmenting path
    algorithm for dense and sparse linear assignment problems"), in float64: N^3 steps at worst, far fewer on matrices
    with clear pairs.
    """
    cost_NN = -gain_NN.detach().double().cpu().numpy()
    size = len(cost_NN)
    row_price, column_price = np.zeros(size), np.zeros(size)
    row_of = np.full(size, -1)
    for start in range(size):
        distance, before = np.full(size, np.inf), np.full(size, -1)
        done = np.zeros(size, dtype=bool)
        row, column, reached = start, -1, 0.0
        visited = [start]
        while True:
            through = reached + cost_NN[row] - row_price[row] - column_price
            nearer = ~done & (through < distance)
            distance[nearer], before[nearer] = through[nearer], row
            column = int(np.where(done, np.inf, distance).argmin())
            done[column], reached = True, distance[column]
            row = int(row_of[column])
            if row < 0:
                break
            visited.append(row)
        # prices keep every reduced cost >= 0, and 0 along the pairs
        column_of = {int(row_of[one]): int(one) for one in done.nonzero()[0] if row_of[one] >= 0}
        row_price[start] += reached
        for row in visited[1:]:
            row_price[row] += reached - distance[column_of[row]]
        column_price[done] -= reached - distance[done]
        while True:
            row = int(before[column])
            row_of[column], column = row, column_of.get(row, -1)
            if row == start:
                break
    found_N = torch.empty(size, dtype=torch.int64)
    found_N[torch.from_numpy(row_of)] = torch.arange(size)
    return found_N
