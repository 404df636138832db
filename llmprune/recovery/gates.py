"""Gates on units of width that are learned open or shut, with a price that leads to a fixed number of open ones."""

from __future__ import annotations

import math

import torch
from accelerate.utils import reduce
from torch import nn

from llmprune.arch.units import Units
from llmprune.methods.width.choice import lowest
from llmprune.recovery.narrower import OnColumns
from llmprune.recovery.progressive import watched

# Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization", section 2.2
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
# The lowest log_alpha at which a gate without noise is 1.
START = math.log((1 - LOW) / (HIGH - 1))
# From the gate that starts lowest to the one that starts highest.
SPREAD = 40.0
# Of open gates when the choice is made: behind a factor of zero no weight would learn.
FLOOR = 0.1


class Gate(OnColumns):
    """A factor for the input columns of a writing matrix that each of U units owns: 1 leaves a unit, 0 takes it out.

    At first factors are 1, and `score_U` sums the squares of their gradients, of each sequence (of experts: of each step), as
    Group Fisher does; `start` gives each gate its place by that. From then on a factor is a hard concrete variable in
    training: s = sigmoid((noise + log_alpha) / TEMPERATURE), with logistic noise, stretched to (LOW, HIGH) and cut to [0, 1].
    Where nothing is trained it is sigmoid(log_alpha), stretched and cut, and 0 for all but the `open` units with the
    highest log_alpha, as many in each stratum; `choose` makes that final. `due`: the share that may be open by now.
    `multipliers`: the two of the price.
    """

    open: torch.Tensor
    due: torch.Tensor
    started: torch.Tensor
    made: torch.Tensor
    score_U: torch.Tensor
    noise_U: torch.Tensor
    factor_U: torch.Tensor

    def __init__(self, units: Units, device: torch.device) -> None:
        super().__init__(units, device)
        for name, value in (
            ("open", torch.tensor(units.count)),
            ("due", torch.tensor(1.0)),
            ("started", torch.tensor(False)),
            ("made", torch.tensor(False)),
            ("score_U", torch.zeros(units.count)),
            ("noise_U", torch.zeros(units.count)),
            ("factor_U", torch.ones(units.count)),
        ):
            self.register_buffer(name, value.to(device))
        self.log_alpha = nn.Parameter(torch.full((units.count,), START, device=device))
        self.multipliers = nn.Parameter(torch.zeros(2, device=device))
        self._stacked = units.stacked
        self._squares_U = torch.zeros(units.count, device=device)
        self._slope_U = torch.zeros(units.count, device=device)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.times(weight, self.drawn() if self.training and not self.made else self.settled().detach())

    def watch(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Before a forward of the matrix, until the start: note what each sequence says of the gates."""
        if self.started or not self.training:
            return args
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        return watched(x, self._note), *args[1:]

    def drawn(self) -> torch.Tensor:
        """Factors with the noise of this step, U."""
        if self._stacked and not self.started:
            return watched(1 + 0 * self.log_alpha, self._note_slope)
        return _stretched((self.noise_U + self.log_alpha) / TEMPERATURE)

    def settled(self) -> torch.Tensor:
        """Factors without noise, U: exactly as many units are open as may be."""
        if self.made:
            return self.factor_U
        gone = torch.tensor(self.gone(), dtype=torch.int64, device=self.log_alpha.device)
        return _stretched(self.log_alpha).index_fill(0, gone, 0.0)

    def gone(self) -> list[int]:
        """The units that are shut: the lowest log_alpha, ties to the lowest number."""
        if self.made:
            return (self.factor_U == 0).nonzero().flatten().tolist()
        return lowest(self.log_alpha.detach(), self.count - int(self.open), self.strata)

    def open_share(self) -> torch.Tensor:
        """The expected share of factors that are not 0 (Louizos et al. 2018, eq. 12)."""
        return (self.log_alpha - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid().mean()

    def price(self) -> torch.Tensor:
        """m1 g + m2 g^2, g being the number of open gates beyond what is due; the multipliers m rise with it.

        Nothing where no more are open than are due, and before the start and after the choice; the gradient is then zero,
        which processes can still add up.
        """
        excess = self.count * (self.open_share() - self.due).clamp(min=0) * (self.started & ~self.made)
        return self.multipliers[0] * excess + self.multipliers[1] * excess.square()

    @torch.no_grad()
    def score(self) -> None:
        """Take what was noted since the last call, in all processes, into the scores."""
        self.score_U += reduce(self._squares_U, "sum") + reduce(self._slope_U, "mean").square()
        self._squares_U, self._slope_U = (torch.zeros_like(self.score_U) for _ in range(2))

    @torch.no_grad()
    def start(self) -> None:
        """Give each gate its place by its score, among those of its stratum."""
        rank_U = self.score_U.view(self.strata, -1).argsort(dim=1, stable=True).argsort(dim=1, stable=True).flatten()
        self.log_alpha.copy_(START + SPREAD * rank_U * self.strata / self.count)
        self.started.fill_(True)

    @torch.no_grad()
    def choose(self) -> None:
        """From now on the units that are shut stay so, and the factors of the others are as they are, or `FLOOR`."""
        gone = self.gone()
        self.factor_U.copy_(self.settled().clamp_min(FLOOR))
        self.factor_U[gone] = 0
        self.made.fill_(True)

    def redraw(self, random: torch.Generator) -> None:
        """Draw the noise of the next step, the same in all processes and for all parts of its batch."""
        self.noise_U.copy_(torch.rand(self.count, generator=random).clamp(1e-6, 1 - 1e-6).logit())

    def _note(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        slope_NTI = x.detach().float() * gradient.float()
        for slope_TI in slope_NTI if slope_NTI.dim() == 3 else [slope_NTI]:
            self._squares_U += self.per_unit(slope_TI.sum(0)).square()

    def _note_slope(self, factor_U: torch.Tensor, gradient_U: torch.Tensor) -> None:
        self._slope_U += gradient_U


def _stretched(logit_U: torch.Tensor) -> torch.Tensor:
    return (logit_U.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)
