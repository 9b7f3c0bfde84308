"""Embedding integrity: what noise on the embeddings of benign prompts does, and whether checks of the embeddings notice it.

After SEP (arXiv 2509.06338), which perturbs embedding outputs of chosen tokens until a model complies; its exact form is
not public and is not built here. This is the descriptive and defensive part, for benign and borderline prompts: dose-response of the
next-token KL, refusal log-odds and embedding distance to noise of relative norm c (`embedding_noise`); regimes; and the two
checks, a digest of the embedding matrix, and whether each perturbed vector still maps to its own token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit
from rsteer_interp.batch import Batch, Tokens
from rsteer_interp.embedding_noise import EmbeddingNoise, Noise, RecordTokens, instruction_embeddings, noise_directions
from rsteer_interp.errors import UserError
from rsteer_interp.measures import kl_divergence, refusal_log_odds
from rsteer_interp.random_audit import Standing
from rsteer_interp.statistics.intervals import Rate

DOSES = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
REGIMES: Mapping[str, float] = MappingProxyType({"noticeable": 0.1, "different": 1.0, "broken": 4.0})
"""Names of regimes and the median next-token KL (nats) above which they begin. SEP tells its regimes by response classifiers."""
MOVED = 1e-3  # relative distance from its own row above which an embedding is not that row; far above rounding


# -- dose-response ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Response:
    """What noise of each relative norm does, per dose and prompt: KL(clean || noisy) of the next token (nats), change of the
    refusal log-odds (nats), and |e' - e| / |e| averaged over tokens; and how many tokens still map to themselves."""

    doses: tuple[float, ...]
    kl: Float[Tensor, "dose prompt"]
    log_odds: Float[Tensor, "dose prompt"]
    distance: tuple[float, ...]
    own_token: tuple[Rate, ...]

    def regimes(self, bounds: Mapping[str, float] = REGIMES) -> dict[str, float | None]:
        """The first dose at which the median KL exceeds each bound; None where no dose does."""
        medians = self.kl.median(1).values.tolist()
        return {
            name: next((dose for dose, kl in zip(self.doses, medians, strict=True) if kl > bound), None)
            for name, bound in bounds.items()
        }


def embedding_response(
    backend: Backend,
    rows: Sequence[Tokens],
    refusal_tokens: Sequence[int],
    directions: Float[Tensor, "m d"],
    doses: Sequence[float] = DOSES,
    *,
    subjects: Sequence[str] | None = None,
) -> Response:
    """Noise along `directions` (see EmbeddingNoise) at rising doses on benign or borderline prompts of these subjects."""
    ordered = tuple(sorted(doses))
    effects = [_effect(backend, rows, refusal_tokens, EmbeddingNoise(directions, dose)) for dose in ordered]
    checks = [integrity(backend, rows, EmbeddingNoise(directions, dose), subjects=subjects) for dose in ordered]
    return Response(
        ordered,
        torch.stack([kl for kl, _ in effects]),
        torch.stack([change for _, change in effects]),
        tuple(check.distance for check in checks),
        tuple(check.own_token for check in checks),
    )


def _effect(
    backend: Backend, rows: Sequence[Tokens], refusal_tokens: Sequence[int], edit: Edit
) -> tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
    kl, change = (torch.zeros(len(rows), dtype=torch.float64) for _ in range(2))

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        clean, noisy = backend.logits(batch), backend.logits(batch, edit)
        moved = refusal_log_odds(noisy[:, -1], refusal_tokens) - refusal_log_odds(clean[:, -1], refusal_tokens)
        return kl_divergence(clean, noisy)[:, -1].double().cpu(), moved.cpu()

    for group, (divergence, moved) in backend.batches(rows, run):
        kl[group], change[group] = divergence, moved
    return kl, change


@dataclass(frozen=True)
class DirectionEffect:
    """A direction on all instruction tokens at one dose, among random ones of equal norm: mean KL, and mean fall of the refusal
    log-odds (positive: refuses less)."""

    dose: float
    kl: Standing
    fall: Standing


def against_random(
    backend: Backend,
    rows: Sequence[Tokens],
    refusal_tokens: Sequence[int],
    direction: Float[Tensor, " d"],
    dose: float,
    *,
    n_random: int = 16,
    kind: Noise = "sphere",
    seed: int = 0,
) -> DirectionEffect:
    """Where a given direction's effects fall among those of N random directions of the same relative norm (the null)."""
    unit = direction.double() / direction.double().norm()
    every = torch.cat([unit[None], noise_directions(n_random, backend.d_model, seed, kind).to(unit)])
    found = [_effect(backend, rows, refusal_tokens, EmbeddingNoise(one[None], dose)) for one in every]
    kl = [float(divergence.mean()) for divergence, _ in found]
    fall = [-float(change.mean()) for _, change in found]
    return DirectionEffect(dose, Standing.of(kl[0], kl[1:]), Standing.of(fall[0], fall[1:]))


# -- integrity -------------------------------------------------------------------------------------------------------


def embedding_matrix(backend: Backend) -> Float[Tensor, "vocab d"]:
    return backend.model.get_input_embeddings().weight.detach()  # type: ignore[no-any-return]


def embedding_digest(backend: Backend) -> str:
    """blake2b of the embedding matrix: shape, dtype and every byte. Notices any change of the stored matrix, and none of a
    vector that is changed on its way into the first block."""
    return _digest([("embedding", embedding_matrix(backend))])


def weights_digest(backend: Backend) -> str:
    """blake2b of every byte of every parameter (a fingerprint is of a sample); of one that is not at hand, name and shape."""
    return _digest(sorted(backend.model.named_parameters(), key=lambda named: named[0]))


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
        if tensor.device.type != "meta":
            for part in torch.split(tensor.detach().flatten(), 1 << 22):  # by parts: bounded memory on any device
                digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def changed_tokens(backend: Backend, reference: Backend) -> Int[Tensor, " changed"]:
    """Ids of tokens whose embedding is not bit for bit that of the reference. UserError for matrices of another shape."""
    ours, theirs = embedding_matrix(backend), embedding_matrix(reference)
    if ours.shape != theirs.shape:
        raise UserError(
            f"embedding matrices of shape {tuple(ours.shape)} and {tuple(theirs.shape)}; compare models with one vocabulary"
        )
    changed: Tensor = (ours != theirs.to(ours)).any(1).nonzero()[:, 0].cpu()
    return changed


@dataclass(frozen=True)
class Integrity:
    """Vectors on their way into the first block against the embedding matrix, over all instruction tokens.

    own_token: nearest row is the token's own (the nearest-neighbour identity test). own_row: no further from its own row than
    MOVED, relative to |e|, which only an unperturbed vector is. distance: mean |e' - e| / |e|.
    """

    own_token: Rate
    own_row: Rate
    distance: float


def integrity(
    backend: Backend, rows: Sequence[Tokens], edit: Edit | None = None, *, subjects: Sequence[str] | None = None
) -> Integrity:
    """The identity test with an edit in place (None: the model as it is). Tokens of one prompt, or of prompts on one subject, are
    a cluster, and so are those that are moved along one direction.

    In many dimensions random noise is nearly orthogonal to the way to any other token, so the identity test notices it only when
    it is several times as long as the embedding; `blind_radius` is the norm below which it can notice nothing at all.
    """
    ids, clean = instruction_embeddings(backend, rows)
    _, found = instruction_embeddings(backend, rows, edit)
    matrix = embedding_matrix(backend).cpu().float()
    own = matrix[ids]
    candidate = own + (found - clean) / embedding_scale(backend)
    size = own.norm(dim=1)
    moved = (candidate - own).norm(dim=1)
    # Unused tokens often share a row: an equal distance is not a nearer token.
    same = moved.square() <= _other_distances(matrix, ids, candidate) + 1e-5 * size.square()
    relative = moved / size
    of = list(range(len(rows))) if subjects is None else list(subjects)
    clusters = [of[i] for i, row in enumerate(rows) for _ in range(row.instruction - row.prefix)]
    along = None
    if isinstance(edit, EmbeddingNoise):
        along = [k % len(edit.directions) for row in rows for k in range(row.instruction - row.prefix)]
    own_token, own_row = (Rate.of(f, clusters=clusters, crossed_with=along) for f in (same, relative <= MOVED))
    return Integrity(own_token, own_row, float(relative.double().mean()))


def blind_radius(backend: Backend, ids: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    """min_j |e_j - e_t| / (2 |e_t|): a perturbation of smaller relative norm maps to its own token, whatever its direction."""
    matrix = embedding_matrix(backend).cpu().float()
    own = matrix[ids]
    radius: Tensor = _other_distances(matrix, ids, own).clamp(min=0).sqrt() / (2 * own.norm(dim=1))
    return radius


def _other_distances(
    matrix: Float[Tensor, "vocab d"], ids: Int[Tensor, " token"], vectors: Float[Tensor, "token d"]
) -> Float[Tensor, " token"]:
    """Squared distance from each vector to the nearest row that is not its token's."""
    squares = matrix.square().sum(1)
    out = []
    for some_ids, some in zip(torch.split(ids, 64), torch.split(vectors, 64), strict=True):
        distances = squares - 2 * (some @ matrix.T) + some.square().sum(1, keepdim=True)
        distances[torch.arange(len(some)), some_ids] = torch.inf
        out.append(distances.amin(1))
    return torch.cat(out)


def embedding_scale(backend: Backend) -> float:
    """s in x = s E[token] + (what depends on position alone) at the first block's input: 1 in most families.

    From two prompts of different tokens, whose difference at each position is s times that of their embeddings. UserError
    where it is not (a norm after the embedding), for there a perturbed vector cannot be led back to a token.
    """
    vocab = len(embedding_matrix(backend))
    rows = [Tokens(tuple((7 * i + k) % vocab for i in range(1, 7)), 0, 5, 6) for k in (0, 3)]
    record = RecordTokens()
    backend.run(backend.batch(rows), record)
    x = record.vectors[0].double().reshape(2, 5, -1)
    e = torch.stack([embedding_matrix(backend)[list(row.ids[:5])] for row in rows]).double().cpu()
    dx, de = x[0] - x[1], e[0] - e[1]
    scale = float((dx * de).sum() / de.square().sum())
    if not float((dx - scale * de).norm()) < 0.01 * float(dx.norm()):
        raise UserError(
            "what enters the first block is not a scaled row of the embedding matrix in this model; "
            "use the digest of the matrix alone"
        )
    return scale
