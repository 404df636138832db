"""A job that leaves out layers or experts: decide on calibration text, then write another checkpoint."""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune.arch.discover import expert_blocks, expert_count, find_units
from llmprune.arch.sublayers import halves
from llmprune.checkpoint.layer_lists import expert_groups, refuse_shared_layers
from llmprune.checkpoint.skeleton import build_skeleton, load_config
from llmprune.checkpoint.surgery import Cutter, Surgery, cut_in_place, edited_config
from llmprune.checkpoint.verify import verify
from llmprune.engine.trunk import Trunk, holding
from llmprune.job import Job
from llmprune.kernels import dispatch
from llmprune.memory import PeakMemory
from llmprune.methods.structural import Decision, Drop, DropExperts
from llmprune.plan import Plan
from llmprune.progress import Reporter
from llmprune.result import Result
from llmprune.types import RunError, UserError
from llmprune.weights import REST, Resident, Streamed

STRUCTURAL = ("depth", "expert")
# Recipe keys that say which weights become zero: they mean nothing here.
WEIGHT_KEYS = (
    *("sparsity", "pattern", "allocation", "targets", "ignore", "overrides"),
    *("refine", "update", "retarget", "reconstruct"),
)


class Restructuring(Job):
    """A checked recipe of a depth or expert method. As for `Job`, creating one writes nothing."""

    def _check_amount(self) -> None:
        recipe, kind = self.recipe, self.method.kind
        if self.ranks.count > 1:
            raise UserError(f"{recipe.method!r} works in one process: start it without torchrun")
        for key in WEIGHT_KEYS:
            if getattr(recipe, key) != type(recipe).model_fields[key].get_default(call_default_factory=True):
                raise UserError(f"{key} has no meaning for {recipe.method!r}, which leaves out whole {_units(kind)}")
        wanted, other = ("drop_layers", "drop_experts") if kind == "depth" else ("drop_experts", "drop_layers")
        if getattr(recipe, wanted) is None:
            example = "drop_layers=4, or drop_layers=5,6,7" if kind == "depth" else "drop_experts=0.25"
            raise UserError(f"say how much {recipe.method!r} should leave out: {example}")
        if getattr(recipe, other) is not None:
            raise UserError(f"{recipe.method!r} leaves out {_units(kind)}; it cannot do {other}")
        if isinstance(recipe.drop_layers, list) and not self.method.takes_list:
            raise UserError(
                f"{recipe.method!r} chooses the layers itself: give their number; to name them leave out the method"
            )
        share = recipe.drop_experts
        if share is not None and not 0 < share < 1:
            raise UserError(f"drop_experts {share} must lie between 0 and 1: it is a fraction of each layer's experts")

    def _make_plan(self) -> Plan:
        refuse_shared_layers(self.config)
        plan = Plan(find_units(self.model, head=False))
        if self.method.kind == "depth":
            assert self.recipe.drop_layers is not None
            self._asked: Any = Drop.of(self.recipe.drop_layers, len(plan.units))
        else:
            self._asked = self._ask_experts(plan)
        return plan

    def _ask_experts(self, plan: Plan) -> DropExperts:
        blocks = {index: block for index, unit in enumerate(plan.units) for _, block in expert_blocks(unit.module)}
        counts = {index: expert_count(block) for index, block in blocks.items()}
        if not counts:
            raise UserError(f"{type(self.model).__name__} has no experts to leave out")
        listed = [block for block in blocks.values() if all(one.dim() < 3 for one in block.parameters(recurse=False))]
        if listed:
            raise UserError(
                f"{type(listed[0]).__name__} keeps its experts as a list of modules, which is not supported"
            )
        if len(set(counts.values())) > 1:
            raise UserError(
                f"layers with different numbers of experts ({sorted(set(counts.values()))}) are not supported"
            )
        assert self.recipe.drop_experts is not None
        experts, groups = next(iter(counts.values())), expert_groups(self.config)
        gone = math.floor(self.recipe.drop_experts * experts + 0.5)
        if gone == 0 or gone % groups:
            raise UserError(
                f"drop_experts {self.recipe.drop_experts} would leave out {gone} of {experts} experts; it must be at "
                f"least one, and the same number in each of the router's {groups} groups"
            )
        asked = DropExperts(len(plan.units), tuple(counts), experts, gone, groups)
        # whether the router can do with so few is known before any scores are
        everything = tuple(range(len(plan.units)))
        example = {index: asked.lowest(dict.fromkeys(range(experts), 0.0)) for index in counts}
        edited_config(self.model, self.config, Surgery(len(plan.units), everything, example))
        return asked

    def check(self, *, resume: bool, overwrite: bool) -> None:
        if self.output is not None:
            self.output.check(source=self.folder, resume=resume, overwrite=overwrite)
        weights = self._weights(writing=False)
        if not self.method.needs:
            # the edit is known already: so is whether the model can be edited so
            decision = self.method.decide(Trunk(self.model, self.plan.units, [], weights), self._asked)
            self._cutter(decision.surgery)

    def describe_plan(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "tensors": [],
            "left_alone": {},
            "calibration": self._describe_calibration(),
            "structure": {"kind": self.method.kind, "memory": self.method.memory, "units": len(self.plan.units)},
            "totals": {"weights": 0, "zeros": 0},
        }

    def run(self, reporter: Reporter, memory: PeakMemory, started: float, *, resume: bool) -> Result:
        """Decide, and only then write: a kill before that loses the decision, not the model."""
        trust = self.recipe.trust_remote_code
        if self.output is not None and resume and self.output.is_finished():
            reporter.say(f"{self.output.folder} is already finished")
            return Result(self._stored_report(), self.output.folder, trust)
        for text in self.tokens.warnings if self.tokens else ():
            reporter.warn(text)
        weights = self._weights(writing=True)
        reporter.say(f"{self.recipe.method}: holds {self.method.memory}")
        with torch.no_grad(), dispatch.recorded() as self._kernels, self.prepared(weights):
            trunk = Trunk(self.model, self.plan.units, self.share.batches, weights)
            decision: Decision = self.method.decide(trunk, self._asked)
        self._new_config, new, cutter = self._cutter(decision.surgery)
        self._totals = {"params_before": _count(self.model), "params_after": _count(new)}
        self._decision = decision
        self._rows = [_row(key, score, decision.surgery, self.plan, cutter) for key, score in decision.scores.items()]
        reporter.say(_in_words(decision, self.plan))
        if isinstance(weights, Resident):
            cut_in_place(self.model, new, cutter)
        if self.output is None:
            return Result(self._report(weights, memory, started, "not saved"), None, trust, self.model, self._tokenizer)
        self.output.open(resume=resume)
        if isinstance(weights, Streamed):
            self._write(weights, cutter)
        self.output.finish(
            self._add_files, lambda folder: self._report(weights, memory, started, self._verify(folder, weights))
        )
        return Result(self._stored_report(), self.output.folder, trust, self._given, self._tokenizer)

    # Parts of a run.

    def _cutter(self, surgery: Surgery) -> tuple[Any, PreTrainedModel, Cutter]:
        """The new configuration as it will be read back, an empty model of it, and the edit; raises UserError."""
        trust = self.recipe.trust_remote_code
        # the one that built the model has had its dtype set
        source = (
            copy.deepcopy(self.config)
            if self.folder is None
            else load_config(str(self.folder), trust_remote_code=trust)
        )
        edited = edited_config(self.model, source, surgery)
        with tempfile.TemporaryDirectory() as folder:
            edited.save_pretrained(folder)
            config = load_config(folder, trust_remote_code=trust) if "auto_map" not in vars(edited) else edited
        new = build_skeleton(copy.deepcopy(config), self.dtype, trust_remote_code=trust)
        return config, new, Cutter(self.model, new, surgery)

    def _write(self, weights: Streamed, cutter: Cutter) -> None:
        """Write the new checkpoint a layer at a time; layers whose values stay keep their stored bytes."""
        assert self.output is not None and self.checkpoint is not None
        routing, surgery, units = weights.routing, cutter.surgery, self.plan.units
        feeds = {key: name for name, group in routing.groups.items() for key in group.keys}
        owner = _layer_of_keys(feeds, [unit.prefix for unit in units], list(self.checkpoint.entries))
        files = 1 + len(surgery.layers)
        decided = _dropped(surgery)
        if REST not in self.output.records:
            rest = {key: self.checkpoint.tensor(key) for key in self.checkpoint.entries if key not in owner}
            self.output.write(REST, (1, files), rest, {"decided": decided})
        if self.output.records[REST]["decided"] != decided:
            raise RunError("the interrupted run decided otherwise; pass --overwrite to start again")
        for place, index in enumerate(surgery.layers):
            if f"layer {index}" in self.output.records:
                continue
            unit = units[index]
            changed = {name: value for name, value in surgery.replaced.items() if name.startswith(unit.prefix)}
            stored = weights.stored(unit, changed)
            stored.update({key: self.checkpoint.tensor(key) for key in weights.unused if owner.get(key) == index})
            cut = (cutter.cut(key, feeds.get(key, key), tensor, index) for key, tensor in stored.items())
            self.output.write(f"layer {index}", (2 + place, files), dict(one for one in cut if one), {})
            self.checkpoint.close()

    def _add_files(self, folder: Path) -> None:
        super()._add_files(folder)
        if self.folder is not None:
            self._new_config.save_pretrained(folder)

    def _verify(self, folder: Path, weights: Streamed | Resident) -> str:
        surgery = self._decision.surgery
        unused = weights.unused if isinstance(weights, Streamed) else []
        trust = self.recipe.trust_remote_code
        if isinstance(weights, Resident):
            return verify(folder, self._logits_in_memory, unused, trust_remote_code=trust)
        if surgery.experts:
            return verify(folder, None, unused, trust_remote_code=trust)
        return verify(
            folder,
            self._logits_without_layers,
            unused,
            of="of the old model, its layers skipped and changed in memory",
            dtype=self.dtype,
            trust_remote_code=trust,
        )

    @torch.no_grad()
    def _logits_without_layers(self, ids: torch.Tensor) -> torch.Tensor:
        """What the old model says if dropped layers are skipped and changed parameters have their new values."""
        weights = self._weights(writing=False)
        with self.prepared(weights):
            trunk = Trunk(self.model, self.plan.units, [{"input_ids": ids.to(self.device)}], weights)
            states = trunk.enter()
            surgery = self._decision.surgery
            for index in surgery.layers:
                unit = self.plan.units[index]
                changed = {
                    name.removeprefix(unit.prefix): value.to(weights.storage_dtype(name)).to(self.device, self.dtype)
                    for name, value in surgery.replaced.items()
                    if name.startswith(unit.prefix)
                }
                with trunk.loaded(index), holding(unit.module, changed):
                    states = trunk.run(index, states)
            return trunk.logits(0, states[0])

    def _report(
        self, weights: Streamed | Resident, memory: PeakMemory, started: float, verified: str
    ) -> dict[str, Any]:
        decision = self._decision
        left_alone = dict.fromkeys(
            weights.unused if isinstance(weights, Streamed) else [],
            "not used by the model class; carried over as it is",
        )
        return {
            **self._describe_run(memory, started),
            "tensors": [],
            "left_alone": left_alone,
            "structure": {
                "kind": self.method.kind,
                "dropped": _dropped(decision.surgery),
                "scores": self._rows,
                "changed": sorted(decision.surgery.replaced),
                "figures": decision.figures,
                "notes": decision.notes,
            },
            "totals": {
                **self._totals,
                "zeros": sum(int((one == 0).sum()) for one in decision.surgery.replaced.values()),
            },
            "warnings": list(self.tokens.warnings if self.tokens else ()),
            "verified": verified,
        }


def _units(kind: str) -> str:
    return "layers" if kind == "depth" else "experts"


def _layer_of_keys(feeds: dict[str, str], prefixes: list[str], keys: list[str]) -> dict[str, int]:
    """Which layer every tensor of the checkpoint belongs to, those that the model does not use included."""
    starts: dict[str, int] = {}
    for key, name in feeds.items():
        for index, prefix in enumerate(prefixes):
            if name.startswith(prefix):
                parts = key.split(".")
                number = next((place for place, part in enumerate(parts) if part == str(index)), None)
                if number is not None:
                    starts[".".join(parts[: number + 1]) + "."] = index
    return {key: index for key in keys for start, index in starts.items() if key.startswith(start)}


def _count(model: PreTrainedModel) -> int:
    tied = model.all_tied_weights_keys
    return sum(one.numel() for name, one in model.named_parameters() if name not in tied)


def _row(key: Any, score: float, surgery: Surgery, plan: Plan, cutter: Cutter) -> dict[str, Any]:
    """The score of a layer, of an expert or of half a layer, whether it goes, and how many parameters that saves."""
    index, part = key if isinstance(key, tuple) else (key, None)
    unit = plan.units[index]
    name, saved, dropped = unit.name, 0, index in surgery.dropped
    if isinstance(part, int):
        name, dropped = f"{unit.name} expert {part}", part not in surgery.experts[index]
        saved = cutter.saved(index)
    elif part is not None:
        # a half that goes alone is filled with zeros, which saves nothing
        name = f"{unit.name} {part}"
        zeros = [unit.prefix + one for one in halves(unit.module)[part].parameters]
        dropped = dropped or all(one in surgery.replaced for one in zeros)
    elif dropped:
        saved = sum(one.numel() for one in unit.module.parameters())
    return {"name": name, "score": score, "dropped": dropped, "saved": saved if dropped else 0}


def _dropped(surgery: Surgery) -> dict[str, Any]:
    kept = surgery.experts
    experts = {str(index): list(stay) for index, stay in kept.items()}
    return {"layers": list(surgery.dropped), "kept_layers": list(surgery.layers), "kept_experts": experts}


def _in_words(decision: Decision, plan: Plan) -> str:
    surgery = decision.surgery
    parts = []
    if surgery.dropped:
        parts.append(f"layers {', '.join(map(str, surgery.dropped))} of {len(plan.units)} go")
    if surgery.experts:
        stay = {len(one) for one in surgery.experts.values()}
        parts.append(f"{', '.join(map(str, stay))} experts stay in each of {len(surgery.experts)} layers")
    if surgery.replaced:
        parts.append(f"{len(surgery.replaced)} parameters change")
    return "; ".join(parts) or "nothing changes"
