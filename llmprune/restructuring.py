"""A job that leaves out layers or experts: decide on calibration text, then write another checkpoint."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune import record
from llmprune.arch.discover import expert_blocks, expert_count, find_units, parameter_count
from llmprune.checkpoint.layer_lists import expert_groups, layer_of_keys, refuse_shared_layers
from llmprune.checkpoint.remote import FILE, add_code, add_entries
from llmprune.checkpoint.skeleton import Routing, build_skeleton, load_config, rebuild_layers
from llmprune.checkpoint.surgery import Cutter, Surgery, cut_in_place, edited_config, shared_experts
from llmprune.checkpoint.verify import token_ids, verify
from llmprune.engine.absent import entries_for, zeros_for
from llmprune.engine.search import run_without
from llmprune.engine.trunk import States, Trunk, holding
from llmprune.job import Job
from llmprune.kernels import dispatch
from llmprune.memory import PeakMemory, within_memory
from llmprune.methods.structural import Decision, Drop, DropExperts
from llmprune.plan import Plan
from llmprune.progress import Reporter
from llmprune.recipe import WEIGHT_KEYS, Recipe
from llmprune.removal import dropped, in_words, row
from llmprune.result import Result
from llmprune.types import RunError, UserError, as_fraction
from llmprune.weights import REST, Resident, Streamed

ZEROS = (
    "no plain model class has layers without attention or MLP: where only one half goes, its last matrix is filled "
    "with zeros, which is exact but not smaller; layout=remote-code really leaves it out"
)
ROUTER = (
    "the plain class has one router row an expert, so each group keeps the row of its most used member: tokens that "
    "went to the others are routed anew, and their gates are not added up (an approximation); layout=remote-code keeps "
    "all rows"
)


class Restructuring(Job):
    """A checked recipe of a depth or expert method. As for `Job`, creating one writes nothing."""

    _silent: Mapping[int, tuple[str, ...]] = MappingProxyType({})  # halves that put out nothing, once decided
    _expected: tuple[torch.Tensor, torch.Tensor] | None = None  # tokens, and what `_expect` said of them

    @staticmethod
    def check_amount(recipe: Recipe, method: Any) -> None:
        kind = method.kind
        recipe.refuse(("allocation", "ratio", "params", "width", *WEIGHT_KEYS), f"leaves out whole {_units(kind)}")
        wanted, other = ("drop_layers", "drop_experts") if kind == "depth" else ("drop_experts", "drop_layers")
        if getattr(recipe, wanted) is None:
            example = "drop_layers=4, or drop_layers=5,6,7" if kind == "depth" else "drop_experts=0.25"
            raise UserError(f"say how much {recipe.method!r} should leave out: {example}")
        if getattr(recipe, other) is not None:
            raise UserError(f"{recipe.method!r} leaves out {_units(kind)}; it cannot do {other}")
        if isinstance(recipe.drop_layers, list) and not method.takes_list:
            raise UserError(
                f"{recipe.method!r} chooses the layers itself: give their number; to name them leave out the method"
            )
        share = recipe.drop_experts
        if share is not None and not 0 < share < 1:
            raise UserError(
                f"drop_experts {share} must lie between 0 and 1: it is a fraction of each layer's experts"
                f"{as_fraction(share)}"
            )

    def _reads_text(self) -> bool:
        return bool(self.method.needs)

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
        if not self.method.needs and self.method.kind != "width":
            # the edit is known already: so is whether the model can be edited so (a plan of widths has seen to that)
            decision = self.method.decide(Trunk(self.model, self.plan.units, [], weights), self._asked)
            self._cutter(decision.surgery)

    def describe_plan(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "tensors": [],
            "left_alone": {},
            "calibration": self.tokens.describe() if self.tokens else None,
            "structure": {"kind": self.method.kind, "memory": self.method.memory, "units": len(self.plan.units)},
            "totals": {"weights": 0, "zeros": 0},
        }

    @within_memory()
    def run(self, reporter: Reporter, memory: PeakMemory, started: float, *, resume: bool) -> Result:
        """Decide, and only then write: a kill before that loses the decision, not the model."""
        trust = self.recipe.trust_remote_code
        if self.output is not None and self.output.claim(resume=resume):
            reporter.say(f"{self.output.folder} is already finished")
            return Result(self._stored_report(), self.output.folder, trust)
        for text in self.tokens.warnings if self.tokens else ():
            reporter.warn(text)
        weights = self._weights(writing=True)
        reporter.say(f"{self.recipe.method}: holds {self.method.memory}")
        if self.recipe.layout == "remote-code":
            reporter.say(f"layout remote-code: the model may need its own {FILE} and trust_remote_code to load")
        with torch.no_grad(), dispatch.recorded() as self._kernels, self.prepared(weights):
            trunk = Trunk(self.model, self.plan.units, self.share.batches, weights, reporter.layer)
            decision = self._decide(trunk, weights)
        reporter.say(self._settle(decision))
        if not self.share.batches:
            # no layer has run yet: that one cannot run by itself shows here, before anything is written
            self._expect(token_ids(self.model))
        if isinstance(weights, Resident):
            self._cut_in_place()
        if self.output is None:
            return Result(self._report(weights, memory, started, "not saved"), None, trust, self.model, self._tokenizer)
        self.output.open()
        if isinstance(weights, Streamed):
            self._write(weights)
        self.output.finish(
            self._add_files, lambda folder: self._report(weights, memory, started, self._verify(folder, weights))
        )
        loaded = self.model if isinstance(weights, Resident) else None
        return Result(self._stored_report(), self.output.folder, trust, loaded, self._tokenizer)

    # Parts of a run.

    def _decide(self, trunk: Trunk, weights: Streamed | Resident) -> Any:
        """What the method says; halves that put out nothing are left out by an entry, or filled with zeros."""
        decision: Decision = self.method.decide(trunk, self._asked)
        surgery = decision.surgery
        if self.recipe.layout == "remote-code":
            entries = entries_for(self._short(weights), surgery.silent) | shared_experts(
                self.model, self.config, surgery
            )
            decision.surgery = replace(surgery, entries=entries)
            return decision
        if surgery.rows:
            decision.notes["router"] = ROUTER
            decision.surgery = surgery = replace(surgery, rows={})
        if surgery.silent:
            decision.notes["halves"] = ZEROS
            decision.surgery = surgery.with_values(zeros_for(self.plan.units, surgery.silent))
        return decision

    def _short(self, weights: Streamed | Resident) -> Trunk:
        """The layers on a few tokens."""
        return Trunk(self.model, self.plan.units, [{"input_ids": token_ids(self.model).to(self.device)}], weights)

    def _settle(self, decision: Decision) -> str:
        """Take a decision: what the new model is. Returns it in words."""
        self._decision, self._silent = decision, decision.surgery.silent
        self._new_config, self._new, self._cut = self._cutter(decision.surgery)
        self._totals = {"params_before": parameter_count(self.model), "params_after": parameter_count(self._new)}
        self._rows = [row(key, score, decision.surgery, self.plan, self._cut) for key, score in decision.scores.items()]
        return in_words(decision, self.plan)

    def _cut_in_place(self) -> None:
        cut_in_place(self.model, self._new, self._cut)

    def _cutter(self, surgery: Surgery) -> tuple[Any, PreTrainedModel, Cutter]:
        """The new configuration, an empty model of it, and the edit; raises UserError."""
        config, new = self._built(edited_config(self.model, self._source_config(), surgery))
        cutter = Cutter(self.model, new, surgery)
        if self.checkpoint is not None:
            cutter.check_keys(self._owners()[1])
        if surgery.entries:
            placed = [surgery.entries.get(index, {}) for index in surgery.layers]
            rebuild_layers(new, cutter.path, placed)
            for one in (config, new.config):
                add_entries(one, cutter.path, placed)
        return config, new, cutter

    def _source_config(self) -> Any:
        """The configuration as it was read: the one that built the model has had its dtype set."""
        if self.folder is None:
            return copy.deepcopy(self.config)
        return load_config(str(self.folder), trust_remote_code=self.recipe.trust_remote_code)

    def _built(self, edited: Any) -> tuple[Any, PreTrainedModel]:
        """A new configuration as it will be read back, and an empty model of it."""
        trust = self.recipe.trust_remote_code
        with tempfile.TemporaryDirectory() as folder:
            edited.save_pretrained(folder)
            config = load_config(folder, trust_remote_code=trust) if "auto_map" not in vars(edited) else edited
        try:
            return config, build_skeleton(copy.deepcopy(config), self.dtype, trust_remote_code=trust)
        except ValueError as error:
            raise UserError(f"{type(self.model).__name__} cannot be built without what would go: {error}") from error

    def _write(self, weights: Streamed) -> None:
        """Write the new checkpoint a layer at a time."""
        assert self.output is not None and self.checkpoint is not None
        feeds, owner = self._owners()
        layers, decided = self._layers(), self._decided()
        files = 1 + len(layers)
        if REST not in self.output.records:
            outside = [key for key in self.checkpoint.entries if key not in owner]
            rest = {key: self._outside(feeds.get(key, key), self.checkpoint.tensor(key)) for key in outside}
            rest |= self._beside(weights)
            self.output.write(REST, (1, files), rest, {"decided": decided})
        if self.output.records[REST]["decided"] != decided:
            raise RunError(
                "the interrupted run decided otherwise, or came to other values, as with another number of threads; "
                "pass --overwrite to start again"
            )
        for place, index in enumerate(layers):
            if f"layer {index}" in self.output.records:
                continue
            unused = [key for key in weights.unused if owner.get(key) == index]
            tensors = self._inside(weights, index, feeds, unused)
            self.output.write(f"layer {index}", (2 + place, files), tensors, {})
            self.checkpoint.close()

    def _owners(self) -> tuple[dict[str, str], dict[str, int]]:
        """Which parameter every tensor of the checkpoint feeds, and to which layer it belongs, where it does."""
        assert self.checkpoint is not None
        feeds = Routing(self.model, self.checkpoint).feeds
        return feeds, layer_of_keys(feeds, [unit.prefix for unit in self.plan.units], list(self.checkpoint.entries))

    def _layers(self) -> list[int]:
        """The layers of the old model that the new one has."""
        return list(self._cut.surgery.layers)

    def _decided(self) -> dict[str, Any]:
        """The decision as it is stored, by which a resumed run knows that it is its own."""
        surgery = self._decision.surgery
        return {**dropped(surgery), "values": record.digest(surgery.replaced)}

    def _outside(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        """What becomes of a tensor outside the layers."""
        return tensor

    def _beside(self, weights: Streamed) -> dict[str, torch.Tensor]:
        """Tensors outside the layers that the old model did not have."""
        return {}

    def _inside(
        self, weights: Streamed, index: int, feeds: dict[str, str], unused: list[str]
    ) -> dict[str, torch.Tensor]:
        """The tensors of a layer by their new keys; one whose values stay keeps its stored bytes."""
        assert self.checkpoint is not None
        unit = self.plan.units[index]
        replaced = self._cut.surgery.replaced.items()
        stored = weights.stored(unit, {name: value for name, value in replaced if name.startswith(unit.prefix)})
        stored.update({key: self.checkpoint.tensor(key) for key in unused})
        cut = (self._cut.cut(key, feeds.get(key, key), tensor, index) for key, tensor in stored.items())
        return dict(one for one in cut if one)

    def _add_files(self, folder: Path) -> None:
        super()._add_files(folder)
        if self.folder is not None:
            self._new_config.save_pretrained(folder)
            if hasattr(self._new_config, "pruned_layers"):
                add_code(folder, self.model)

    def _verify(self, folder: Path, weights: Streamed | Resident) -> str:
        unused = weights.unused if isinstance(weights, Streamed) else []
        trust = self.recipe.trust_remote_code
        if isinstance(weights, Resident):
            return verify(folder, self._logits_in_memory, unused, trust_remote_code=trust)
        if not self._comparable():
            return verify(folder, None, unused, trust_remote_code=trust)
        return verify(
            folder,
            self._expect,
            unused,
            of="of the old model, cut likewise in memory",
            dtype=self.dtype,
            tolerance=self._tolerance(weights),
            trust_remote_code=trust,
        )

    def _tolerance(self, weights: Streamed) -> float:
        """How far logits may lie apart, as a share of the largest: values that stay have no rounding of their own."""
        return 1e-3

    def _comparable(self) -> bool:
        """Whether the old model computes the same with layers skipped and other values in the rest."""
        return not self._decision.surgery.experts

    def _expect(self, ids: torch.Tensor) -> torch.Tensor:
        """`_logits_of_old_model`, once for the same tokens."""
        if self._expected is None or not torch.equal(self._expected[0], ids):
            self._expected = ids, self._logits_of_old_model(ids)
        return self._expected[1]

    @torch.no_grad()
    def _logits_of_old_model(self, ids: torch.Tensor) -> torch.Tensor:
        """What the old model says if dropped layers are skipped and changed parameters have their new values."""
        weights = self._weights(writing=False)
        with self.prepared(weights):
            trunk = Trunk(self.model, self.plan.units, [{"input_ids": ids.to(self.device)}], weights)
            states = self._entering(trunk.enter())
            for index in self._layers():
                unit = self.plan.units[index]
                gone = {(index, half) for half in self._silent.get(index, ())}
                with trunk.loaded(index):
                    changed = {
                        name.removeprefix(unit.prefix): value.to(self.device, self.dtype)
                        for name, value in self._changed(weights, index).items()
                    }
                    with holding(unit.module, changed):
                        states = run_without(trunk, index, states, gone)
            return trunk.logits(0, states[0])

    def _entering(self, states: States) -> States:
        """The hidden state on entering the first layer, if what is left out of it is zero."""
        return states

    def _changed(self, weights: Streamed | Resident, index: int) -> dict[str, torch.Tensor]:
        """The parameters of a loaded layer of the old model that have other values in the new one."""
        prefix = self.plan.units[index].prefix
        replaced = self._decision.surgery.replaced.items()
        return {name: one.to(weights.storage_dtype(name)) for name, one in replaced if name.startswith(prefix)}

    def _report(
        self, weights: Streamed | Resident, memory: PeakMemory, started: float, verified: str
    ) -> dict[str, Any]:
        structure, zeros = self._structure()
        return {
            **self._describe_run(memory, started),
            "tensors": [],
            "left_alone": record.unused(weights),
            "layout": "remote-code" if hasattr(self._new_config, "pruned_layers") else "plain",
            "structure": {"kind": self.method.kind, **structure},
            "totals": {**self._totals, "zeros": zeros},
            "warnings": [*(self.tokens.warnings if self.tokens else ()), *self._warnings()],
            "verified": verified,
        }

    def _structure(self) -> tuple[dict[str, Any], int]:
        """What the report says of the decision, and how many zeros it put in."""
        decision = self._decision
        structure = {
            "dropped": dropped(decision.surgery),
            "scores": self._rows,
            "changed": sorted(decision.surgery.replaced),
            "figures": decision.figures,
            "notes": decision.notes,
        }
        return structure, sum(int((one == 0).sum()) for one in decision.surgery.replaced.values())

    def _warnings(self) -> list[str]:
        """What the user should know of the result."""
        return []


def _units(kind: str) -> str:
    return "layers" if kind == "depth" else "experts"
