"""The weights of a model in memory, written in the names, layout and dtypes of the checkpoint that it came from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from llmprune.arch.discover import decoder_layers
from llmprune.checkpoint.output import Output
from llmprune.checkpoint.skeleton import Routing
from llmprune.checkpoint.source import Checkpoint
from llmprune.recovery.zeros import Target
from llmprune.types import RunError


@torch.no_grad()
def round_to_storage(model: PreTrainedModel, routing: Routing, checkpoint: Checkpoint) -> None:
    """Give every parameter the values that it will have when it is read back."""
    tied = model.all_tied_weights_keys
    for name, parameter in model.named_parameters():
        if name not in tied:
            parameter.copy_(parameter.to(checkpoint.entries[routing.group_of(name).keys[0]].dtype))


def write_weights(
    output: Output,
    model: PreTrainedModel,
    routing: Routing,
    checkpoint: Checkpoint,
    targets: list[Target],
    edit: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Write every tensor of the checkpoint with the model's values, a file a decoder layer and one for the rest.

    `edit(name, value)`: what is stored in place of a parameter's value; it may have another shape.

    Raises RunError for a value that is no finite number, and for a weight of a target that is zero in the
    checkpoint and would not be any more.
    """
    path, layers = decoder_layers(model)
    tensors = routing.store("", edit) | {key: checkpoint.tensor(key) for key in routing.unused}
    parts = {f"layer {index}": routing.keys_under(f"{path}.{index}.") for index in range(len(layers))}
    inside = {key for keys in parts.values() for key in keys}
    parts = {"rest": [key for key in tensors if key not in inside], **parts}
    matrices = {key for target in targets for key in routing.group_of(target.name).keys} if edit is None else set()
    for place, (name, keys) in enumerate(parts.items(), 1):
        stored = {key: _as_stored(key, tensors[key], checkpoint, key in matrices) for key in keys}
        output.write(name, (place, len(parts)), stored, {})
        checkpoint.close()


def _as_stored(key: str, tensor: torch.Tensor, checkpoint: Checkpoint, keeps_zeros: bool) -> torch.Tensor:
    source = checkpoint.tensor(key)
    stored = tensor.detach().to("cpu", source.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise RunError(f"{key} would hold NaN or infinity in {source.dtype}; set a smaller training.learning_rate")
    if keeps_zeros and bool((stored[source == 0] != 0).any()):
        raise RunError(f"{key} would lose zeros that the pruned model has")
    return stored
