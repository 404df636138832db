"""Which parameter plays which role: queries, keys, gates, norms, embeddings. The layouts are data (`families/*.yaml`).

Only methods that make matrices narrower need this; everything else finds its way without names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmprune.arch.discover import decoder_layers
from llmprune.types import UserError

# Keys of `modeling_pruned` by which a layer has other numbers of heads, channels or dimensions.
OF_OTHER_WIDTH = {"config", "heads", "halves"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AttentionNames(_Strict):
    """Modules of an attention, by their path in the layer: either query, key and value, or one that fuses them.

    `order` of a fused one: "stacked", all queries, then all keys, then all values; "grouped", for each kv group its
    query heads, its key and its value (one query head a group: q, k, v side by side for each head).
    """

    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused: str | None = None
    order: Literal["stacked", "grouped"] | None = None
    output: str
    norms: dict[Literal["query", "key"], str] = Field(default_factory=dict)


class MlpNames(_Strict):
    """Modules of an MLP: up and down, with gate if it is gated; `gate_up` where gate and up are one, gate first."""

    gate: str | None = None
    up: str | None = None
    gate_up: str | None = None
    down: str


class ExpertNames(MlpNames):
    router: str


class Keys(_Strict):
    """Configuration keys. One that is missing is no key of that class: the number follows from others."""

    heads: str
    kv_heads: str | None = None
    channels: str | None = None
    expert_channels: str | None = None
    hidden: str


class Host(_Strict):
    """A class that computes the same and accepts more shapes, if none of the parameters `without` is in use."""

    type: str
    set: dict[str, Any] = Field(default_factory=dict)
    without: tuple[str, ...] = ()


class NarrowHidden(_Strict):
    """Model types whose hidden state can lose dimensions in a plain class: RMSNorm with its `epsilon` in that key."""

    types: tuple[str, ...]
    epsilon: str


class Layout(_Strict):
    """A file of `families`. `embeddings` and `final_norm` are relative to the decoder, the rest to a layer.

    `neighbours`: the types whose rotary embedding turns the dimensions 2i and 2i + 1 of a head together; that of other
    types turns i and i + n / 2, of n that it turns.
    """

    types: tuple[str, ...]
    attention: AttentionNames
    neighbours: tuple[str, ...] = ()
    mlp: MlpNames | None = None
    experts: ExpertNames | None = None
    shared: MlpNames | None = None
    embeddings: tuple[str, ...]
    norms: tuple[str, ...]
    final_norm: str
    config: Keys
    narrow_hidden: NarrowHidden | None = None
    host: dict[str, Host] = Field(default_factory=dict)


@dataclass(frozen=True)
class Weight:
    """A matrix by its parameter's name, and which axes hold its outputs and inputs. Experts have a third, the first."""

    name: str
    shape: torch.Size
    output_axis: int
    input_axis: int
    bias: str | None = None

    @property
    def outputs(self) -> int:
        return self.shape[self.output_axis]

    @property
    def inputs(self) -> int:
        return self.shape[self.input_axis]


@dataclass(frozen=True)
class Attention:
    """The weights of an attention with `heads` query heads in `groups` kv groups, each `head_dim` wide.

    `between`: other parameters of its module, such as norms of queries and keys. `turned_PN`: the dimensions of a head that
    go through the rotary embedding together, P pairs (what it leaves alone is paired with its neighbour); each by itself
    where the model has none.
    """

    query: Weight | None
    key: Weight | None
    value: Weight | None
    fused: Weight | None
    order: str | None
    output: Weight
    query_norm: str | None
    key_norm: str | None
    between: tuple[str, ...]
    heads: int
    groups: int
    head_dim: int
    turned_PN: torch.Tensor


@dataclass(frozen=True)
class Mlp:
    """The weights of an MLP, or of fused experts; `channels` is its inner width."""

    gate: Weight | None
    up: Weight | None
    gate_up: Weight | None
    down: Weight
    channels: int
    experts: int = 1


@dataclass(frozen=True)
class LayerRoles:
    """The parameters of one decoder layer."""

    attention: Attention
    mlp: Mlp | None
    experts: Mlp | None
    shared: Mlp | None
    router: str | None
    norms: tuple[str, ...]

    @property
    def readers(self) -> tuple[str, ...]:
        """The first matrix of attention and of MLP that reads the hidden state: each sees what a norm puts out."""
        query = self.attention.query or self.attention.fused
        mlp = self.mlp and (self.mlp.gate or self.mlp.gate_up or self.mlp.up)
        found = (query and query.name, mlp.name if mlp else self.router)
        return tuple(name for name in found if name)


class Roles:
    """The layout of a model, resolved to its parameters. Raises UserError for a model type that none describes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.layout = layout_of(model.config)
        entries = getattr(model.config, "pruned_layers", None) or ()
        if any(one.keys() & OF_OTHER_WIDTH for one in entries):
            raise UserError(
                "the layers of this model differ in width from what its configuration says (layout=remote-code), so where "
                "its heads and channels lie is not known; prune the width of the dense model once, and by all that should go"
            )
        self.path, layers = decoder_layers(model)
        self._text = model.config.get_text_config()
        self.model = model
        self.layers = [self._layer(f"{self.path}.{index}", layer) for index, layer in enumerate(layers)]
        self.hidden: int = getattr(self._text, self.layout.config.hidden)

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Parameters of token and position embeddings."""
        return tuple(f"{self._decoder}{name}.weight" for name in self.layout.embeddings)

    @property
    def final_norm(self) -> tuple[str, ...]:
        """Parameters of the last norm; none where it has no gain."""
        return self._own(f"{self._decoder}{self.layout.final_norm}")

    @property
    def head(self) -> str | None:
        """The parameter of the output head; None if it is tied to the embeddings."""
        module = self.model.get_output_embeddings()
        name = next(name for name, one in self.model.named_modules() if one is module)
        return None if f"{name}.weight" in self.model.all_tied_weights_keys else f"{name}.weight"

    @property
    def _decoder(self) -> str:
        base = self.path.rpartition(".")[0]
        return f"{base}." if base else ""

    def _layer(self, prefix: str, layer: nn.Module) -> LayerRoles:
        names = self.layout
        mlp = self._mlp(prefix, layer, names.mlp)
        experts = self._mlp(prefix, layer, names.experts)
        if mlp is None and experts is None:
            wanted = " or ".join(one.down for one in (names.mlp, names.experts) if one)
            raise UserError(f"{prefix} has no {wanted}: it is no layer of the kind that {self._text.model_type} has")
        return LayerRoles(
            self._attention(prefix, layer),
            mlp,
            experts,
            self._mlp(prefix, layer, names.shared),
            f"{prefix}.{names.experts.router}.weight" if experts and names.experts else None,
            tuple(name for norm in names.norms for name in self._own(f"{prefix}.{norm}")),
        )

    def _attention(self, prefix: str, layer: nn.Module) -> Attention:
        names = self.layout.attention
        query, key, value, fused = (
            _weight(prefix, layer, one) for one in (names.query, names.key, names.value, names.fused)
        )
        output = _weight(prefix, layer, names.output)
        if output is None or (fused is None and (query is None or key is None or value is None)):
            raise UserError(f"{prefix} has no attention of the kind that {self._text.model_type} layers have")
        heads = getattr(self._text, self.layout.config.heads)
        head_dim = output.inputs // heads
        # counted in the weights: some classes keep the number of kv heads in flags
        rows = fused.outputs - heads * head_dim if fused else 2 * (key.outputs if key else 0)
        norms = {role: next(iter(self._own(f"{prefix}.{path}")), None) for role, path in names.norms.items()}
        matrices = [one for one in (query, key, value, fused, output) if one is not None]
        known = {name for one in matrices for name in (one.name, one.bias)}
        holder = names.output.rpartition(".")[0]
        inside = [f"{prefix}.{holder}.{name}" for name, _ in layer.get_submodule(holder).named_parameters()]
        return Attention(
            query,
            key,
            value,
            fused,
            names.order,
            output,
            norms.get("query"),
            norms.get("key"),
            tuple(name for name in inside if name not in known),
            heads,
            rows // (2 * head_dim),
            head_dim,
            self._turned(head_dim),
        )

    def _turned(self, head_dim: int) -> torch.Tensor:
        """See `Attention`."""
        buffers = self.model.named_buffers()
        frequencies = [
            one.numel() for name, one in buffers if name.startswith(self._decoder) and name.endswith("inv_freq")
        ]
        turned = 2 * frequencies[0] if frequencies else getattr(self._text, "rotary_dim", None) or 0
        dimensions_H = torch.arange(head_dim)
        if not turned:
            return dimensions_H[:, None]
        if self._text.model_type in self.layout.neighbours:
            return dimensions_H.view(-1, 2)
        return torch.cat([dimensions_H[:turned].view(2, -1).T, dimensions_H[turned:].view(-1, 2)])

    def _mlp(self, prefix: str, layer: nn.Module, names: MlpNames | None) -> Mlp | None:
        down = None if names is None else _weight(prefix, layer, names.down)
        if names is None or down is None:
            return None
        gate, up, gate_up = (_weight(prefix, layer, one) for one in (names.gate, names.up, names.gate_up))
        experts = down.shape[0] if len(down.shape) == 3 else 1
        return Mlp(gate, up, gate_up, down, down.inputs, experts)

    def _own(self, path: str) -> tuple[str, ...]:
        """The parameters of a module, none if there is no such module."""
        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            return ()
        return tuple(f"{path}.{short}" for short, _ in module.named_parameters(recurse=False))


def layout_of(config: Any) -> Layout:
    """The layout of a configuration's model type; raises UserError where there is none."""
    kind = config.get_text_config().model_type
    known = {name: layout for layout in layouts() for name in layout.types}
    if kind not in known:
        raise UserError(
            f"which parameters of a {kind!r} model are heads and channels is not known, so it cannot be made narrower "
            f"(known: {', '.join(sorted(known))}); weights, layers and experts of it can be pruned"
        )
    return known[kind]


@cache
def layouts() -> tuple[Layout, ...]:
    """Every layout that comes with the package."""
    return tuple(_read_layouts())


def _read_layouts() -> Iterator[Layout]:
    folder = resources.files("llmprune.arch").joinpath("families")
    for file in sorted(folder.iterdir(), key=lambda one: one.name):
        yield Layout.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))


def _weight(prefix: str, layer: nn.Module, path: str | None) -> Weight | None:
    """The matrix at a path: a linear module, or a parameter that holds those of all experts; None if not there."""
    if path is None:
        return None
    holder, _, short = path.rpartition(".")
    try:
        owner = layer.get_submodule(holder)
    except AttributeError:
        return None
    found: Any = getattr(owner, short, None)
    if isinstance(found, nn.Parameter):
        return Weight(f"{prefix}.{path}", found.shape, 1, 2)
    if not isinstance(getattr(found, "weight", None), nn.Parameter):
        return None
    bias = f"{prefix}.{path}.bias" if getattr(found, "bias", None) is not None else None
    axes = (1, 0) if isinstance(found, Conv1D) else (0, 1)
    return Weight(f"{prefix}.{path}.weight", found.weight.shape, *axes, bias)
