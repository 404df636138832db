"""What a run will do, decided before it does anything: which matrices, and how much of each."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from llmprune.allocation import Allocator, Dense
from llmprune.arch.discover import Unit, find_units
from llmprune.recipe import Recipe
from llmprune.statistics import of_text
from llmprune.types import Budget, MatrixSpec, Method, UserError


@dataclass
class Plan:
    """The units of the model in order, the budget of every chosen matrix, and why the rest is left alone."""

    units: list[Unit]
    budgets: dict[str, Budget] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)

    def specs(self) -> list[MatrixSpec]:
        return [spec for layer in self.layers() for spec in layer]

    def chosen(self, unit: Unit) -> list[MatrixSpec]:
        """The chosen matrices of a unit."""
        return [spec for spec in unit.matrices if spec.name in self.budgets]

    def chosen_units(self) -> list[Unit]:
        """The units that hold a chosen matrix."""
        return [unit for unit in self.units if self.chosen(unit)]

    def layers(self) -> list[list[MatrixSpec]]:
        """The chosen matrices of each of them."""
        return [self.chosen(unit) for unit in self.chosen_units()]


def select_matrices(model: PreTrainedModel, recipe: Recipe) -> Plan:
    """Find the model's matrices and keep those that the recipe's targets and ignores leave.

    Raises UserError for a pattern that matches nothing, a target that is no matrix to prune, and a head that shares
    the embedding.
    """
    head = _asks_for_head(model, recipe.targets)
    plan = Plan(find_units(model, head=head))
    parameters = [name for name, _ in model.named_parameters()]
    matrices = [spec.name for unit in plan.units for spec in unit.matrices]
    for pattern in recipe.targets:
        if not any(matches(pattern, name) for name in matrices):
            other = next((f"only {name}, which is never pruned" for name in parameters if matches(pattern, name)), None)
            raise UserError(
                f"target {pattern!r} matches {other or 'no matrix of the model'}; matrices are called {_examples(plan)}"
            )
    for pattern in recipe.ignore:
        if not any(matches(pattern, name) for name in (*parameters, *matrices)):
            raise UserError(f"ignore {pattern!r} matches no matrix of the model; they are called {_examples(plan)}")
    for unit in plan.units:
        plan.left_alone.update(unit.left_alone)
        for spec in unit.matrices:
            if recipe.targets and not any(matches(pattern, spec.name) for pattern in recipe.targets):
                plan.left_alone[spec.name] = "not among the targets"
            elif any(matches(pattern, spec.name) for pattern in recipe.ignore):
                plan.left_alone[spec.name] = "ignored"
            else:
                plan.budgets[spec.name] = Budget(0.0)
    if not plan.budgets:
        raise UserError("targets and ignore leave nothing to prune")
    return plan


def allocate(plan: Plan, recipe: Recipe, method: Method, allocator: Allocator, dense: Dense) -> None:
    """Fill in the budgets; raises UserError for a pattern that does not divide a matrix's inputs."""
    specs = plan.specs()
    plan.budgets = allocator(dense, recipe.budget())
    for override in recipe.overrides:
        budget = override.budget()
        for pattern in override.targets:
            hit = [spec.name for spec in specs if matches(pattern, spec.name)]
            if not hit:
                raise UserError(
                    f"override target {pattern!r} matches no chosen matrix; they are called {_examples(plan)}"
                )
            plan.budgets.update(dict.fromkeys(hit, budget))
    for spec in specs:
        check_pattern(spec, plan.budgets[spec.name], method)


def check_pattern(spec: MatrixSpec, budget: Budget, method: Method) -> None:
    """Whether an N:M pattern fits a matrix; raises UserError naming it."""
    group = budget.pattern.group
    if not group:
        return
    if "N:M" not in method.patterns:
        raise UserError(f"this method has no N:M patterns, so {budget.pattern} is not for it; give a sparsity")
    if spec.transposed is None and not of_text(method.needs):
        raise UserError(
            f"{spec.name}: which axis holds the inputs is only seen when the model runs, and this method does not run "
            f"it; use a calibrated method for {budget.pattern}, or leave it out with --ignore"
        )
    sizes = (spec.inputs,) if spec.transposed is not None else (spec.inputs, spec.outputs)
    if all(size % group for size in sizes):
        raise UserError(
            f"pattern {budget.pattern} does not divide the {spec.inputs} inputs of {spec.name}; "
            "leave it out with --ignore, or give it another amount with an override"
        )


def matches(pattern: str, name: str) -> bool:
    """Whether a target pattern names a matrix.

    `re:REGEX` matches from the start of the name; a glob the whole name; anything else the whole
    name or a run of its dotted parts (`q_proj`, `layers.3`, `mlp`). The ending `.weight` and the
    index of an expert need not be written.
    """
    bare = name.partition("[")[0]
    forms = {name, bare, bare.removesuffix(".weight")}
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern[3:])
        except re.error as error:
            raise UserError(f"target {pattern!r} is not a valid regular expression: {error}") from error
        return any(regex.match(form) for form in forms)
    if any(char in pattern for char in "*?"):
        return any(fnmatch.fnmatchcase(form, pattern) for form in forms)
    return any(f".{pattern}." in f".{form}." for form in forms)


def _asks_for_head(model: PreTrainedModel, targets: list[str]) -> bool:
    """Whether a target names the output head alone; raises UserError if the head is the embedding."""
    head = model.get_output_embeddings()
    name = next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)
    if head is None or name is None:
        return False
    others = [other for other, _ in model.named_parameters() if other != name]
    asked = [one for one in targets if matches(one, name) and not any(matches(one, other) for other in others)]
    if asked and name in model.all_tied_weights_keys:
        raise UserError(f"target {asked[0]!r}: {name} is the embedding matrix (tied weights), which is not pruned")
    return bool(asked)


def _examples(plan: Plan) -> str:
    names = [spec.name for unit in plan.units[:1] for spec in unit.matrices]
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
