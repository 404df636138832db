"""SliceGPT: turn the residual stream to its principal axes and leave out the last of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from llmprune.arch.stream import Half, Stream
from llmprune.checkpoint.rotation import ROWS, Turned
from llmprune.engine.stream import centred, check, written
from llmprune.engine.trunk import States, Trunk
from llmprune.methods.structural import TEXT
from llmprune.types import UserError


@dataclass(frozen=True)
class SliceGPT:
    """The eigenvectors of sum X'X, X what enters a norm, are the new axes; those with the largest eigenvalues stay.

    Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", section 3.
    `layout=remote-code`: as published, a basis before every attention and MLP, found layer by layer on the stream as it
    has been sliced so far; two shortcut matrices a layer lead from one to the next; the last MLP writes in the old
    basis, so final norm and head stay. Plain: one basis for the whole model, from the dense model; each token counts
    alike, as its norm would see it, at all places. A head that is tied to the embeddings stays so: its rows are one place
    more, and the last norm keeps of its gain what `checkpoint.rotation.aligned` says. Deviations: no random mixing of
    the axes at the end (it changes no output), no damping (it changes no axis), and the mean is left alone where the
    norms do not subtract it.
    """

    kind: ClassVar[str] = "width"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain, or remote-code"
    paper: ClassVar[str] = "arXiv:2401.15024"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer, its activations, and a basis (remote-code: two a layer) in float64"

    def turn(self, trunk: Trunk, stream: Stream, width: int, *, shared: bool) -> Turned:
        """The bases in which `width` dimensions stay."""
        turned = Turned([])
        pooled_DD = torch.zeros(stream.hidden, stream.hidden, dtype=torch.float64)
        states = [centred(stream, one) for one in trunk.enter()]
        if not shared:
            states = _reduce(stream, states, width, turned)
        for index, halves in enumerate(stream.layers):
            layer = trunk.units[index].module
            with trunk.loaded(index):
                check(trunk, stream, index, states)
                for number, half in enumerate(halves):
                    _fold(turned, layer, stream.prefix(index), half)
                    if shared:
                        pooled_DD += covariance(_unit(one) for one in states)
                    states = [
                        state + centred(stream, written(trunk, index, batch, number, half, state))
                        for batch, state in enumerate(states)
                    ]
                    last = index == trunk.depth - 1 and number == 1
                    if last and not shared:
                        turned.bases.append(torch.eye(stream.hidden, dtype=torch.float64))
                    elif not shared:
                        states = _reduce(stream, states, width, turned)
        if shared:
            pooled_DD += covariance(_unit(one) for one in states)
            if stream.roles.head is None:
                pooled_DD += _of_head(trunk) * sum(one[..., 0].numel() for one in states)
            turned.bases = [principal(pooled_DD, width)] * (2 * trunk.depth + 1)
        return turned


def principal(covariance_DD: torch.Tensor, width: int) -> torch.Tensor:
    """The eigenvectors of the `width` largest eigenvalues, as columns, float64."""
    vectors_DD: torch.Tensor = torch.linalg.eigh(covariance_DD).eigenvectors
    return vectors_DD.flip(1)[:, :width].contiguous()


def covariance(states: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of x x' over all tokens, float64, on the CPU."""
    rows = (one.flatten(0, 1).double() for one in states)
    return sum((x_TD.T @ x_TD for x_TD in rows), torch.zeros((), dtype=torch.float64)).cpu()


@torch.no_grad()
def _of_head(trunk: Trunk) -> torch.Tensor:
    """The mean of e e' over the rows of a head that is tied to the embeddings, each of length 1, float64."""
    embed: Any = trunk.model.get_input_embeddings()
    rows = torch.arange(embed.num_embeddings, device=trunk.batches[0]["input_ids"].device).split(ROWS)
    mean_DD: torch.Tensor = covariance(_unit(embed(one[None])) for one in rows) / embed.num_embeddings
    return mean_DD


def _reduce(stream: Stream, states: States, width: int, turned: Turned) -> States:
    """The states in their principal subspace, whose basis is noted."""
    found_DD = covariance(states)
    if stream.centred:
        # the mean is zero, so its direction goes first whatever else is zero
        found_DD -= found_DD.trace() / len(found_DD)
    basis_Dd = principal(found_DD, width)
    turned.bases.append(basis_Dd)
    projector_DD = (basis_Dd @ basis_Dd.T).to(states[0].device, states[0].dtype)
    return [one @ projector_DD for one in states]


def _fold(turned: Turned, layer: nn.Module, prefix: str, half: Half) -> None:
    """Note the gain of a norm, and what its bias adds to the outputs of each matrix that reads it."""
    norm = layer.get_submodule(half.norm)
    gain_D: Any = norm.weight
    turned.gains[prefix + half.norm] = gain_D.detach().double().cpu()
    offset_D: Any = getattr(norm, "bias", None)
    for one in half.readers if offset_D is not None else ():
        if one.bias is None:
            raise UserError(f"{one.name} has no bias that could take up the bias of {prefix}{half.norm}")
        weight = layer.get_parameter(one.name.removeprefix(prefix)).detach().double()
        weight_OI = weight if one.input_axis == 1 else weight.T
        turned.offsets[one.bias] = (weight_OI @ offset_D.detach().double()).cpu()


def _unit(state: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(state.double(), dim=-1)
