"""Where a training stands, on disk: one safetensors file for the present, one for the best weights so far."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llmprune import interruption

Tensors = dict[str, torch.Tensor]


@dataclass
class State:
    """`curve`: a row a look at the held-out text; `losses`: of the steps since; `best_step` of the weights kept."""

    done: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    waited: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def write_state(
    folder: Path,
    state: State,
    trained: dict[str, nn.Parameter],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> None:
    """Store weights, moments and `state`, over what was stored before."""
    interruption.check()
    tensors = _weights(trained, model)
    for name, one in trained.items():
        for key, value in optimizer.state.get(one, {}).items():
            tensors[f"{key}:{name}"] = _whole(value)
    _write(folder / "state.safetensors", tensors, {"state": json.dumps(asdict(state))}, accelerator)


def read_state(
    folder: Path, model: nn.Module, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> State:
    """Put weights and moments back as they were stored."""
    with safe_open(folder / "state.safetensors", framework="pt") as file:
        state = State(**json.loads(file.metadata()["state"]))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    _put(tensors, model, trained)
    for key, value in tensors.items():
        kind, _, name = key.partition(":")
        if kind not in ("weight", "buffer"):
            like = trained[name]
            # the count of steps is a scalar, which is not sharded
            optimizer.state[like][kind] = _like(value, like) if value.dim() else value
    return state


def write_best(folder: Path, trained: dict[str, nn.Parameter], model: nn.Module, accelerator: Accelerator) -> None:
    """Keep the present weights as the best."""
    _write(folder / "best.safetensors", _weights(trained, model), {}, accelerator)


def read_best(folder: Path, model: nn.Module) -> None:
    """Put the best weights into the model."""
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    with safe_open(folder / "best.safetensors", framework="pt") as file:
        _put({key: file.get_tensor(key) for key in file.keys()}, model, trained)  # noqa: SIM118


def _weights(trained: dict[str, nn.Parameter], model: nn.Module) -> Tensors:
    """What a step may change: the trained parameters, and masks that move with the training."""
    tensors = {f"weight:{name}": _whole(one.detach()) for name, one in trained.items()}
    return tensors | {f"buffer:{name}": one.cpu() for name, one in _moving(model).items()}


def _moving(model: nn.Module) -> Tensors:
    stored = model.state_dict(keep_vars=True)
    return {name: one for name, one in model.named_buffers() if name in stored and ".parametrizations." in name}


@torch.no_grad()
def _put(tensors: Tensors, model: nn.Module, trained: dict[str, nn.Parameter]) -> None:
    for name, one in trained.items():
        one.copy_(_like(tensors[f"weight:{name}"], one))
    for name, buffer in _moving(model).items():
        buffer.copy_(tensors[f"buffer:{name}"])


def _whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()


def _like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def _write(path: Path, tensors: Tensors, metadata: dict[str, str], accelerator: Accelerator) -> None:
    """Write a file at once or not at all, by the first process."""
    if accelerator.is_main_process:
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".writing")
        save_file({name: one.contiguous() for name, one in tensors.items()}, temporary, metadata=metadata)
        temporary.rename(path)
    accelerator.wait_for_everyone()
