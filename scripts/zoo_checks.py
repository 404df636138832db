"""What `zoo.py` does with each model. A check returns what is worth saying beside "ok"."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from zoo_models import VOCABULARY

import llmprune
from llmprune.arch.discover import expert_blocks, find_units
from llmprune.statistics import MOMENTS, Stats
from llmprune.types import Budget, Edit, Matrix

TOKENS = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))

Check = Callable[[PreTrainedModel, Path], str]
SEEN: dict[str, torch.Tensor] = {}


@dataclasses.dataclass(frozen=True)
class Recorder:
    """A method that changes nothing and remembers the column norms that it was given."""

    kind: ClassVar[str] = "weight"
    needs: ClassVar[frozenset[str]] = frozenset({MOMENTS})
    patterns: ClassVar[tuple[str, ...]] = ("unstructured",)
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = ""

    def planned(self, outputs: int, inputs: int, budget: Budget) -> int:
        return 0

    def solve(self, matrix: Matrix, stats: Stats | None, budget: Budget) -> Edit:
        assert stats is not None
        SEEN[matrix.name] = stats.square_sums_I
        return Edit.unchanged(matrix.weight_OI)


def engine(model: PreTrainedModel, folder: Path) -> str:
    """The engine's column norms, from disk, against hooks on the linear layers of a plain forward."""
    expected: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            sums_I = args[0].double().flatten(0, -2).square().sum(0)
            expected[name] = expected.get(name, 0.0) + sums_I

        return add

    handles = [
        module.register_forward_pre_hook(hook(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    with torch.no_grad():
        for batch in TOKENS.split(2):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    compared = 0
    for schedule in ("layer", "module"):
        SEEN.clear()
        done = prune(folder, method=f"{__name__}:Recorder", sparsity=0.0, schedule=schedule)
        for name in SEEN.keys() & expected.keys():
            # float32 sums of squares, of activations that went through another order of products
            torch.testing.assert_close(SEEN[name].double(), expected[name], rtol=1e-3, atol=1e-5)
        compared = len(SEEN.keys() & expected.keys())
        lost = expected.keys() - SEEN.keys() - done.report["left_alone"].keys()
        inside = {name for name in lost if any(name.startswith(one.prefix) for one in find_units(model, head=False))}
        if inside:
            raise AssertionError(f"{len(inside)} matrices saw inputs and are not in the report: {sorted(inside)[:3]}")
    if not SEEN:
        raise AssertionError("no matrix was found")
    return f"{len(SEEN)} matrices, {compared} compared"


def prune(source: Path | PreTrainedModel, out: Path | None = None, **settings: Any) -> llmprune.Result:
    settings = {"calibration": TOKENS, "batch_size": 2, **settings}
    if isinstance(source, Path) and out is None:
        with tempfile.TemporaryDirectory() as scratch:
            return llmprune.prune(source, out=Path(scratch) / "out", **settings)
    return llmprune.prune(source, out=out, **settings)


def weights(method: str, schedules: tuple[str, ...], **amount: Any) -> Check:
    def check(model: PreTrainedModel, folder: Path) -> str:
        for schedule in schedules:
            settings = {"method": method, "schedule": schedule, **amount}
            with tempfile.TemporaryDirectory() as scratch:
                streamed = prune(folder, Path(scratch) / "streamed", **settings)
                resident = prune(load(folder), Path(scratch) / "resident", **settings)
                rows = {row["name"]: row["achieved"] for row in streamed.report["tensors"]}
                one, other = (load(Path(scratch) / name) for name in ("streamed", "resident"))
                differ = [key for key, value in one.state_dict().items() if not same(value, other.state_dict()[key])]
                if differ:
                    raise AssertionError(f"{schedule}: {len(differ)} tensors differ from those in memory: {differ[:3]}")
                # the same weights in the same class: only the experts may run in another order
                torch.testing.assert_close(logits(one), logits(resident.model), rtol=1e-3, atol=1e-4)
        return f"{len(rows)} matrices, {sum(rows.values())} zeros"

    return check


def depth(model: PreTrainedModel, folder: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        done = prune(folder, Path(scratch) / "out", method="keep-first", drop_layers=1)
        smaller = load(Path(scratch) / "out")
        totals = done.report["totals"]
        if count(smaller) != totals["params_after"] or count(smaller) >= count(model):
            raise AssertionError(f"{count(smaller)} parameters, where {totals} were reported")
        return generates(smaller, model)


def experts(model: PreTrainedModel, folder: Path) -> str:
    if not any(True for unit in find_units(model, head=False) for _ in expert_blocks(unit.module)):
        return "none"
    with tempfile.TemporaryDirectory() as scratch:
        prune(folder, Path(scratch) / "out", method="expert-norm", drop_experts=0.5)
        smaller = load(Path(scratch) / "out")
        if count(smaller) >= count(model):
            raise AssertionError("no parameter went")
        return generates(smaller, model)


def width(model: PreTrainedModel, folder: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        settings = {"ratio": 0.2}
        resident = prune(load(folder), method="wanda-sp", **settings)
        prune(folder, Path(scratch) / "out", method="wanda-sp", **settings)
        smaller = load(Path(scratch) / "out")
        if count(smaller) >= count(model):
            raise AssertionError("no parameter went")
        torch.testing.assert_close(logits(smaller), logits(resident.model), rtol=1e-3, atol=1e-4)
        return generates(smaller, model)


CHECKS: dict[str, Check] = {
    "engine": engine,
    "sparsegpt 50 %": weights("sparsegpt", ("layer", "module"), sparsity=0.5),
    "2:4": weights("sparsegpt", ("layer",), pattern="2:4"),
    "wanda 50 %": weights("wanda", ("module",), sparsity=0.5),
    "depth": depth,
    "experts": experts,
    "width": width,
}


def generates(model: PreTrainedModel, dense: PreTrainedModel) -> str:
    """Raises if greedy text with the cache is not that without, where the dense model does not fail at that as well."""
    try:
        _same_text(model)
    except (AssertionError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        try:
            _same_text(dense)
        except type(error):
            return f"but the class itself cannot generate: {one_line(error)}"
        raise
    return ""


def _same_text(model: PreTrainedModel) -> None:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(TOKENS[:1, :8], use_cache=cache, **settings) for cache in (True, False))
    if not torch.equal(cached, plain):
        raise AssertionError(f"with the cache {cached[0, 8:].tolist()}, without {plain[0, 8:].tolist()}")


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS[:2], use_cache=False).logits
    return found


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(*(each.flatten().contiguous().view(torch.uint8) for each in (one, other)))


def count(model: PreTrainedModel) -> int:
    return sum(one.numel() for name, one in model.named_parameters() if name not in model.all_tied_weights_keys)


def one_line(error: BaseException) -> str:
    """What an error says, or else its kind."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines)[:300]
