"""A linear layer that holds its 2:4 weights packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmprune.kernels.sparse24 import matmul24, pack24, unpack24


class SparseLinear24(nn.Module):
    """`nn.Linear` with frozen 2:4 weights in packed form (see `sparse24`).

    To the outside it is the layer that it replaces: `weight` and the state dict give the dense matrix, so
    `save_pretrained` of a model with such layers writes a plain checkpoint. Gradients reach the input and the bias.
    """

    values: torch.Tensor
    metadata: torch.Tensor

    def __init__(self, values_OV: torch.Tensor, metadata_OB: torch.Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = len(values_OV), values_OV.shape[1] * 2
        self.register_buffer("values", values_OV, persistent=False)
        self.register_buffer("metadata", metadata_OB, persistent=False)
        self.bias = bias

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> SparseLinear24:
        """Pack a layer; raises ValueError if its weights are not 2:4."""
        return cls(*pack24(linear.weight.detach()), linear.bias).train(linear.training)

    @property
    def weight(self) -> torch.Tensor:
        """The dense matrix, O x I: a fresh tensor."""
        return unpack24(self.values, self.metadata)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y_TO: torch.Tensor = matmul24(x.reshape(-1, self.in_features), self.values, self.metadata)
        y = y_TO.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        weight_OI = state_dict.pop(prefix + "weight", None)
        if weight_OI is None:
            rest[2].append(prefix + "weight")  # the list of missing keys
        else:
            values_OV, metadata_OB = pack24(weight_OI)
            self.values.copy_(values_OV)
            self.metadata.copy_(metadata_OB)
        super()._load_from_state_dict(state_dict, prefix, *rest)
