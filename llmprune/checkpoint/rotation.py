"""A model with its hidden state in other bases, fewer dimensions of which are kept: every parameter's new value.

A network whose norms only divide by a root mean square computes the same in any orthogonal basis of its residual
stream (Ashkboos et al. 2024, "SliceGPT", theorem 1). LayerNorm is such a norm of a stream whose mean is zero, and all
that writes to the stream can be made to keep it so. Gains and offsets of norms go into the matrices that read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch

from llmprune.arch.stream import Stream

# Rows of a matrix that are turned at once: an embedding in float64 would take too much room.
ROWS = 16384
Edit: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Turned:
    """What a method answers: the basis of the stream before the first layer and after every half, widths D x d.

    `gains` of the norms by module name; `offsets`, what their biases add up to after a reading matrix, by the name of
    its bias. `notes` go to the report.
    """

    bases: list[torch.Tensor]
    gains: dict[str, torch.Tensor] = field(default_factory=dict)
    offsets: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: dict[str, object] = field(default_factory=dict)

    @property
    def shared(self) -> bool:
        """Whether one basis serves everywhere, so that no shortcut is needed."""
        return all(one is self.bases[0] for one in self.bases)


class Rotation:
    """The new values of all parameters of `stream`; with one shared basis the final norm and the head change too."""

    def __init__(self, stream: Stream, turned: Turned) -> None:
        self._stream, self._turned = stream, turned
        self._edits: dict[str, Edit] = {}
        roles = stream.roles
        for name in roles.embeddings:
            self._edits[name] = partial(_project, basis_Dd=self._centred(turned.bases[0]), axis=1)
        for index, halves in enumerate(stream.layers):
            for number, half in enumerate(halves):
                before_Dd, after_Dd = turned.bases[2 * index + number : 2 * index + number + 2]
                gain_D = turned.gains[f"{stream.prefix(index)}{half.norm}"]
                for one in half.readers:
                    self._edits[one.name] = partial(_project, basis_Dd=gain_D[:, None] * before_Dd, axis=one.input_axis)
                    if one.bias in turned.offsets:
                        self._edits[one.bias] = partial(torch.add, other=turned.offsets[one.bias])
                for one in half.writers:
                    self._edits[one.name] = partial(_project, basis_Dd=self._centred(after_Dd), axis=one.output_axis)
                    if one.bias:
                        self._edits[one.bias] = partial(_project, basis_Dd=self._centred(after_Dd), axis=0)
                norm = f"{stream.prefix(index)}{half.norm}.weight"
                self._edits[norm] = partial(_gain, kept=before_Dd.shape[1])
        if turned.shared:
            (final,) = roles.final_norm
            kept_Dd = turned.bases[-1]
            gained_Dd = turned.gains[final.removesuffix(".weight")][:, None] * kept_Dd
            if roles.head is None:
                self._edits[final] = partial(_gain, kept=kept_Dd.shape[1], gain_d=(kept_Dd * gained_Dd).sum(0))
            else:
                self._edits[final] = partial(_gain, kept=kept_Dd.shape[1])
                self._edits[roles.head] = partial(_project, basis_Dd=gained_Dd, axis=1)

    @property
    def head(self) -> str:
        """The parameter of the output head, tied or not."""
        model = self._stream.roles.model
        head = model.get_output_embeddings()
        return next(f"{name}.weight" for name, one in model.named_modules() if one is head)

    def value(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What a parameter becomes, in its dtype."""
        edit = self._edits.get(name)
        return tensor if edit is None else edit(tensor).to(tensor.dtype).contiguous()

    def shortcut(self, index: int, number: int) -> torch.Tensor:
        """The matrix (outputs x inputs) that leads the stream past half `number` of a layer into its next basis."""
        before_Dd, after_Dd = self._turned.bases[2 * index + number : 2 * index + number + 2]
        return after_Dd.T @ before_Dd

    def _centred(self, basis_Dd: torch.Tensor) -> torch.Tensor:
        """What is written in this basis has mean zero in the old one, where the model's norms subtract the mean."""
        return basis_Dd - basis_Dd.mean(0) if self._stream.centred else basis_Dd


def _project(tensor: torch.Tensor, basis_Dd: torch.Tensor, axis: int) -> torch.Tensor:
    """Its entries along `axis`, D of them, in a basis of d."""
    rows_RD = tensor.movedim(axis, -1)
    flat_RD = rows_RD.reshape(-1, rows_RD.shape[-1])
    basis_Dd = basis_Dd.to(tensor.device)
    parts = [(one.double() @ basis_Dd).to(tensor.dtype) for one in flat_RD.split(ROWS)]
    return torch.cat(parts).view(*rows_RD.shape[:-1], -1).movedim(-1, axis)


def _gain(tensor: torch.Tensor, kept: int, gain_d: torch.Tensor | float = 1.0) -> torch.Tensor:
    """The mean square is now over `kept` entries, but was over all of them."""
    return torch.full((kept,), math.sqrt(len(tensor) / kept), dtype=torch.float64) * gain_d


def aligned(basis_Dd: torch.Tensor, gain_D: torch.Tensor) -> torch.Tensor:
    """Another basis of the same subspace, in which a gain of every old dimension is one of every new dimension.

    So a norm before tied embeddings can keep its gain: with Q'GQ diagonal, (EQ)(Q'GQ) = E QQ'G Q differs from the EGQ of
    a head of its own only by what embeddings E have outside of the subspace, and the gain brings into it.
    """
    vectors_dd: torch.Tensor = torch.linalg.eigh(basis_Dd.T @ (gain_D[:, None] * basis_Dd)).eigenvectors
    return basis_Dd @ vectors_dd
