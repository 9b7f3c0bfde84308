"""A model of independent sites, in which the direction that carries refusal is planted at each, and a study of it.

    state at site s = topic + noise + r a u_s        log-odds of refusal = mean over sites of <state, u_s> / a - 0.3

r = +1 for prompts that are refused, -1 for the others. What is taken out at one site is not missing at the next: a direction that
is right at one site alone removes no more than that site's share. Replies are the word "no" where the log-odds are above 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from analyses.dimensionality import Config
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.backends.sampling import Replies
from rsteer_interp.batch import Tokens
from rsteer_interp.judges.base import Verdict
from rsteer_interp.prompts import Split, load_prompts
from rsteer_interp.reproduction.scores import Scored

WIDTH, N_SITES = 64, 8
REFUSAL = 1  # of two tokens


class PlantedSites(Backend):
    """`states` (prompt, site, d) of prompt i, whose tokens are (0, i, 1); `keeps_refusing`: its replies heed no edit."""

    name = "planted"
    n_layers, d_model = N_SITES + 1, WIDTH
    can_share_prefix = False
    device = torch.device("cpu")

    def __init__(self, states: Tensor, directions: Tensor, size: float, keeps_refusing: bool = False) -> None:
        super().__init__(nn.Identity(), SimpleNamespace(pad_token_id=0))
        self.states, self.directions, self.size, self.keeps_refusing = states, directions, size, keeps_refusing

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(Site(layer) for layer in range(1, N_SITES + 1))

    def withdraw(self, site: Site) -> None:
        raise NotImplementedError

    def _forward(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        *,
        hooks: Mapping[Site, Callable[[Tensor], Tensor]],
        **_: Any,
    ) -> tuple[Tensor, None]:
        score = torch.full((len(ids),), -0.3)
        for i, u in enumerate(self.directions):
            x = self.states[ids[:, 1], i][:, None].expand(-1, 3, -1)
            if Site(i + 1) in hooks:
                x = hooks[Site(i + 1)](x)
            score += x[:, -1] @ u / (self.size * N_SITES)
        return torch.stack([torch.zeros_like(score), score], 1)[:, None], None

    def generate(
        self, batch: Any, max_new_tokens: int, edit: Any = None, sampling: Any = None, read: Any = None
    ) -> Replies:
        logits = self.logits(batch, edit)[:, -1]
        said = self.logits(batch)[:, -1] if self.keeps_refusing else logits
        n = len(batch)
        return Replies(said.argmax(1)[:, None], torch.ones(n, dtype=torch.long), torch.zeros(n, 1), read(logits))

    def decode(self, replies: Replies) -> list[str]:
        return ["no" if token == REFUSAL else "yes" for token in replies.ids[:, 0].tolist()]


class NoJudge:
    name = "no"

    def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        return [Verdict.of(0.9 if text == "no" else 0.1) for text in responses]


@dataclass
class PlantedStudy:
    """What `Inputs` and the causal steps ask of a study; nothing is kept on disk."""

    directions: Tensor
    seed: int = 0
    size: float = 2.0
    noise: float = 0.2
    keeps_refusing: bool = False
    config: Config = field(default_factory=lambda: Config(ks=(1, 2, 4, 8), random=12, resamples=20))
    refusal_tokens = (REFUSAL,)
    judge = NoJudge()

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.index: dict[str, int] = {}
        states, self.confidence = [torch.zeros(2, N_SITES, WIDTH)], [0.0, 0.0]  # of the two tokens of the template
        topics: dict[str, Tensor] = {}
        for name in ("political_sensitive", "political_matched"):
            for prompt in load_prompts(name):
                if prompt.prompt in self.index:
                    continue
                self.index[prompt.prompt] = len(self.confidence)
                r = 1.0 if float(torch.rand(1, generator=generator)) < 0.5 else -1.0
                topic = topics.setdefault(prompt.subject, 0.1 * torch.randn(N_SITES, WIDTH, generator=generator))
                noise = self.noise * torch.randn(N_SITES, WIDTH, generator=generator)
                states.append((topic + noise + r * self.size * self.directions)[None])
                self.confidence.append(r)
        self.all = torch.cat(states).float()
        self.backend = PlantedSites(self.all, self.directions.float(), max(self.size, 1.0), self.keeps_refusing)
        self.sites = [Site(layer) for layer in range(1, N_SITES + 1)]
        self.n_layers = N_SITES + 1
        self.template = SimpleNamespace(
            encode_all=lambda texts: [Tokens((0, self.index[t], 1), 1, 2, 3) for t in texts]
        )

    def scored(self, split: Split, *sets: str) -> Scored:
        prompts = [p for name in sets for p in load_prompts(name).split(split)]
        confidence = torch.tensor([self.confidence[self.index[p.prompt]] for p in prompts], dtype=torch.float64)
        return Scored([p.prompt for p in prompts], [p.set for p in prompts], [p.subject for p in prompts], confidence)

    def states(self, split: Split, *sets: str) -> dict[Site, Tensor]:
        rows = self.all[[self.index[text] for text in self.scored(split, *sets).texts]]
        return {site: rows[:, i] for i, site in enumerate(self.sites)}

    def stage(self, name: str, key: Any, compute: Callable[[], tuple[Any, Any]]) -> Any:
        data, tensors = compute()
        return SimpleNamespace(data=data, tensors=tensors)
