"""RDO: a refusal direction trained by gradient, so that without it a model complies and changes in nothing else.

Wollschlaeger et al., The Geometry of Refusal (arXiv 2502.17420), file `rdo.py`; for a unit vector r, with DIM the
difference of means at one block input:

    L(r) = 1.0 CE(r ablated everywhere, refused prompts -> compliance) + 0.2 CE(|DIM| r added at that block input, answered
           ordinary prompts -> refusal) + 1.0 KL(plain || r ablated) on ordinary prompts + w retain

Differences from the paper. Targets are openers of a few tokens in place of 30-token replies, so no harmful text is ever
made or learned from, and ordinary prompts have the first tokens of the model's own reply. The retain term is ours: how far
the refusal log-odds of prompts whose refusal is to stay fall, max(0, plain - ablated) in nats. It makes the direction the
retain-constrained one. The direction of the KL is our reading of "ablated vs plain".
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.batch import Batch, Tokens, length_groups
from rsteer_interp.directions import Evidence, MeanDifference
from rsteer_interp.equal_norm import Rotated, turned_edits
from rsteer_interp.errors import UserError
from rsteer_interp.evaluation import log_odds
from rsteer_interp.interventions import Affine, Everywhere
from rsteer_interp.measures import kl_divergence, refusal_log_odds
from rsteer_interp.methods.base import Fitted, Material, Treatment
from rsteer_interp.nulls import random_unit_vectors
from rsteer_interp.training import Descent, Trained, answer_mean, cross_entropy, target_logits, train

DEPTHS = (0.4, 0.5, 0.6, 0.7)  # where DIM is looked for; Arditi et al. select within 0.38 to 0.63, below 0.8


def stream_sites(backend: Backend) -> list[Site]:
    """Everything that enters the stream: the first block's input, and each block's attn_out and mlp_out; the output of a
    block that does not offer these."""
    sites = [Site(0)]
    for layer in range(backend.n_layers):
        writers = [Site(layer, "attn_out"), Site(layer, "mlp_out")]
        sites += writers if backend.sites.issuperset(writers) else [Site(layer, "resid_post")]
    return sites


def ablation(backend: Backend, r: Float[Tensor, " d"], kappa: float = 1.0) -> Edit:
    """h - kappa <h, r> r on everything that enters the stream, which then holds 1 - kappa of its component along r.

    For kappa = 1 the same as ablating every block input and every attention and MLP output (Arditi et al.), which for
    other kappa would take away the rest block by block.
    """
    return Everywhere({site: Affine(site, r, kappa=kappa) for site in stream_sites(backend)})


def displacements(backend: Backend, r: Float[Tensor, " d"], into: Float[Tensor, "n d"]) -> list[Rotated]:
    """The nulls of `ablation`: every state is moved as far as the ablation of r moves it, but along each of `into`."""
    return turned_edits(ablation(backend, r), backend.run, r[None], list(into[:, None]))


def mean_difference(material: Material, layer: int) -> Float[Tensor, " d"]:
    """DIM entering block `layer`: mean of the refused prompts of `remove` minus that of the answered ones of `contrast`."""
    remove, contrast = material.fit[material.remove], material.fit[material.contrast]
    refused, answered = remove.where(remove.refused), contrast.where(contrast.answered)
    if not refused.texts or not answered.texts:
        raise UserError(
            f"{len(refused.texts)} refused prompts in '{material.remove}' and {len(answered.texts)} answered ones in "
            f"'{material.contrast}'; a mean difference needs both, use larger sets"
        )
    rows = torch.cat([refused.states[Site(layer)], answered.states[Site(layer)]])
    scores = torch.cat([torch.ones(len(refused.texts)), -torch.ones(len(answered.texts))])
    return MeanDifference().fit(Evidence(rows, scores))


def dim_layer(material: Material, *, n_prompts: int = 16) -> int:
    """The block among DEPTHS whose DIM, ablated everywhere, leaves the lowest refusal log-odds on refused `remove` prompts
    of the select split: the ablation score of Arditi et al., at the last prompt token alone and without their filters."""
    examples = material.select[material.remove]
    texts = examples.where(examples.refused).texts[:n_prompts]
    if not texts:
        raise UserError(
            f"no refused prompts in the select split of '{material.remove}'; name a layer or use a larger set"
        )
    rows = material.template.encode_all(texts)
    scores = {
        layer: float(
            log_odds(
                material.backend,
                rows,
                material.refusal_tokens,
                ablation(material.backend, mean_difference(material, layer)),
            ).mean()
        )
        for layer in sorted({max(1, round(depth * material.n_layers)) for depth in DEPTHS})
    }
    return min(scores, key=scores.__getitem__)


@dataclass(frozen=True)
class Weights:
    """Weights of the terms of L(r); the first three are the paper's. retain: nats of lost log-odds against nats per token."""

    comply: float = 1.0
    refuse: float = 0.2
    same: float = 1.0
    retain: float = 0.0


@dataclass(frozen=True, eq=False)
class RefusalLoss:
    """L(r) of the module's docstring as a `training.Loss` of one row, a minibatch of every term per step, in turn.

    `refused` end with the compliance opener, `induced` with the refusal opener, `ordinary` with the model's own first
    tokens, `kept` with nothing.
    """

    backend: Backend
    site: Site  # of DIM
    amount: float  # |DIM|
    refusal_tokens: tuple[int, ...]
    refused: tuple[Batch, ...]
    induced: tuple[Batch, ...]
    ordinary: tuple[Batch, ...]
    kept: tuple[Batch, ...] = ()
    weights: Weights = Weights()

    def __call__(self, rows: Float[Tensor, "1 d"], step: int) -> Iterator[Float[Tensor, ""]]:
        for name, weight in asdict(self.weights).items():
            if weight:
                yield weight * self.term(name, rows, step, grad=True)

    def term(self, name: str, rows: Float[Tensor, "1 d"], step: int, *, grad: bool = False) -> Float[Tensor, ""]:
        """One term before weighting, in nats; but for "retain", per token."""
        (r,) = rows
        if name == "refuse":
            batch = self.induced[step % len(self.induced)]
            added = Affine(self.site, r, amount=self.amount)
            return cross_entropy(target_logits(self.backend, batch, added, grad=grad), batch).mean()
        ablated = ablation(self.backend, r)
        if name == "comply":
            batch = self.refused[step % len(self.refused)]
            return cross_entropy(target_logits(self.backend, batch, ablated, grad=grad), batch).mean()
        if name == "same":
            i = step % len(self.ordinary)
            logits = target_logits(self.backend, self.ordinary[i], ablated, grad=grad)
            return answer_mean(kl_divergence(self._plain_logits[i], logits), self.ordinary[i]).mean()
        assert name == "retain"
        i = step % len(self.kept)
        odds = refusal_log_odds(self.backend.logits(self.kept[i], ablated, grad=grad)[:, -1], self.refusal_tokens)
        return (self._plain_log_odds[i] - odds).relu().mean()

    # Clones, because what inference mode makes cannot be kept for a backward pass.
    @cached_property
    def _plain_logits(self) -> list[Tensor]:
        return [target_logits(self.backend, batch, None, grad=False).clone() for batch in self.ordinary]

    @cached_property
    def _plain_log_odds(self) -> list[Tensor]:
        odds = [refusal_log_odds(self.backend.logits(batch)[:, -1], self.refusal_tokens) for batch in self.kept]
        return [values.clone() for values in odds]


@dataclass(frozen=True)
class RDO:
    """Ablation everywhere of a direction trained to take away the refusal of `remove`; strength is kappa of `ablation`.

    `layer`: block input of DIM; None looks for it (`dim_layer`). `start`: "dim", or "random" as in the paper, which has
    one epoch of hundreds of prompts for it. `steps` and `batch` are for a CPU: the paper has batches of 16.
    """

    name: ClassVar[str] = "rdo"
    label: ClassVar[str] = "Trained direction (RDO)"
    source: ClassVar[str] = "Wollschlaeger et al., The Geometry of Refusal, arXiv 2502.17420"
    strengths: ClassVar[tuple[float, ...]] = (0.5, 0.75, 1.0, 1.25)

    layer: int | None = None
    start: Literal["dim", "random"] = "dim"
    compliance: str = "Sure, here"
    refusal: str = "I'm sorry, but"
    reply_tokens: int = 4  # of the model's own replies to ordinary prompts
    n_prompts: int = 32  # at most, for each term
    batch: int = 8
    steps: int = 20
    lr: float = 1e-2
    retain: float = 0.0

    def fit(self, material: Material) -> Fitted:
        (r,) = self.train(material).value.float()
        return lambda kappa: Treatment(ablation(material.backend, r, kappa))

    def train(self, material: Material) -> Trained:
        """The unit direction, in float64, with its losses."""
        loss, dim = self.loss(material)
        start = dim if self.start == "dim" else random_unit_vectors(1, len(dim), material.seed)[0]
        return train(start[None], loss, self.descent)

    @property
    def descent(self) -> Descent:
        return Descent(steps=self.steps, lr=self.lr)

    def loss(self, material: Material) -> tuple[RefusalLoss, Float[Tensor, " d"]]:
        """L(r) on the material's fit split, and DIM."""
        backend, template = material.backend, material.template
        layer = dim_layer(material) if self.layer is None else self.layer
        dim = mean_difference(material, layer)
        sets = [material.fit[name] for name in (material.contrast, *material.ordinary)]
        answered = self._draw([text for examples in sets for text in examples.where(examples.answered).texts], material)
        if not answered:
            raise UserError("no ordinary prompt is answered, so nothing says what is to stay; use other ordinary sets")
        remove, keep = material.fit[material.remove], material.fit[material.keep]
        refused, kept = (self._draw(examples.where(examples.refused).texts, material) for examples in (remove, keep))
        if self.retain and not kept:
            raise UserError(
                f"no prompt of '{material.keep}' is refused, so there is nothing to retain; use method 'rdo'"
            )

        def batches(rows: Sequence[Tokens]) -> tuple[Batch, ...]:
            groups = list(length_groups(rows, self.batch))
            random.Random(material.seed).shuffle(groups)
            return tuple(backend.batch([rows[i] for i in group]) for group in groups)

        loss = RefusalLoss(
            backend,
            Site(layer),
            float(dim.norm()),
            material.refusal_tokens,
            batches(template.encode_all(refused, [self.compliance] * len(refused))),
            batches(template.encode_all(answered, [self.refusal] * len(answered))),
            batches(with_own_replies(backend, template.encode_all(answered), self.reply_tokens)),
            batches(template.encode_all(kept)) if self.retain else (),
            Weights(retain=self.retain),
        )
        return loss, dim

    def _draw(self, texts: Sequence[str], material: Material) -> list[str]:
        return random.Random(material.seed).sample(list(texts), min(self.n_prompts, len(texts)))


@dataclass(frozen=True)
class RDORetain(RDO):
    """RDO with the retain term: the refusal log-odds of refused `keep` prompts are not to fall. `retain` is ours; at 1 a nat
    lost there counts as much as a nat per token of the paper's terms."""

    name: ClassVar[str] = "rdo_retain"
    label: ClassVar[str] = "Trained, retaining (RDO)"

    retain: float = 1.0


def with_own_replies(backend: Backend, rows: Sequence[Tokens], n_tokens: int) -> list[Tokens]:
    """The prompts followed by the first tokens of the model's own greedy reply."""
    out = list(rows)
    for group, replies in backend.batches(rows, lambda batch: backend.generate(batch, n_tokens)):
        for i, ids, length in zip(group, replies.ids, replies.lengths.tolist(), strict=True):
            out[i] = replace(rows[i], ids=rows[i].ids + tuple(ids[:length].tolist()))
    return out
