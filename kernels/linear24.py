"""Linear layers that hold their 2:4 weights packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmprune.kernels import eligibility
from llmprune.kernels.sparse24 import compress24, matmul24, pack24, unpack24


class Packed24(nn.Module):
    """A packed 2:4 matrix (see `sparse24`), whose rows may be the outputs of several layers with one input.

    `compressed`: the same matrix once more, as the vendor's library wants it for many tokens; see `compress`.
    """

    values: torch.Tensor
    metadata: torch.Tensor
    compressed: torch.Tensor | None

    def __init__(self, values_OV: torch.Tensor, metadata_OB: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values_OV, persistent=False)
        self.register_buffer("metadata", metadata_OB, persistent=False)
        self.register_buffer("compressed", None, persistent=False)
        self._last: tuple[torch.Tensor, torch.Tensor, int] | None = None

    def forward(self, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Outputs `start` to `end` for inputs ... x I.

        Layers that share the matrix are called with the same tensor one after the other: the first call computes
        the outputs of all, the last one lets go of them.
        """
        if end - start == len(self.values):
            return self._product(x)
        if self._last is None or self._last[0] is not x:
            self._last = (x, self._product(x), len(self.values))
        _, y, left = self._last
        left -= end - start
        self._last = (x, y, left) if left > 0 else None
        return y[..., start:end]

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        y_TO: torch.Tensor = matmul24(x.reshape(-1, x.shape[-1]), self.values, self.metadata, self.compressed)
        return y_TO.view(*x.shape[:-1], len(self.values))

    def compress(self) -> None:
        """Keep the form for many tokens as well, if cuSPARSELt takes this matrix: another 0.5625 of the dense bytes."""
        if eligibility.cusparselt_matrix(self.values) is None:
            self.compressed = compress24(unpack24(self.values, self.metadata))


class SparseLinear24(nn.Module):
    """`nn.Linear` with frozen 2:4 weights in packed form: some rows of a `Packed24`.

    To the outside it is the layer that it replaces: `weight` and the state dict give the dense matrix, so
    `save_pretrained` of a model with such layers writes a plain checkpoint. Gradients reach the input and the bias.
    """

    def __init__(self, packed: Packed24, start: int, end: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.packed, self.start, self.end = packed, start, end
        self.out_features, self.in_features = end - start, packed.values.shape[1] * 2
        self.bias = bias

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> SparseLinear24:
        """Pack a layer; raises ValueError if its weights are not 2:4."""
        packed = Packed24(*pack24(linear.weight.detach()))
        return cls(packed, 0, linear.out_features, linear.bias).train(linear.training)

    @property
    def values(self) -> torch.Tensor:
        return self.packed.values[self.start : self.end]

    @property
    def metadata(self) -> torch.Tensor:
        return self.packed.metadata[self.start : self.end]

    @property
    def weight(self) -> torch.Tensor:
        """The dense matrix, O x I: a fresh tensor."""
        return unpack24(self.values, self.metadata)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.packed(x, self.start, self.end)
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
            if self.packed.compressed is not None:
                self.packed.compress()
        super()._load_from_state_dict(state_dict, prefix, *rest)


def join(layers: list[SparseLinear24]) -> None:
    """Let layers with the same input compute in one product, in place; each keeps its rows and its bias."""
    parts = [layer.packed for layer in layers]
    joined = Packed24(torch.cat([one.values for one in parts]), torch.cat([one.metadata for one in parts]))
    start = 0
    for layer in layers:
        layer.packed, layer.start, layer.end = joined, start, start + layer.out_features
        start = layer.end
