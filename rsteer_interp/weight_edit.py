"""Weight orthogonalisation: W <- W - scale r r^T W for what writes to the residual stream, and the checkpoint it gives.

Arditi et al. (arXiv 2406.11717), section 4.1 of methods.md: token embedding, learned positions, attention and MLP output with
their biases. Then, for scale 1, no state of the stream has a component along r, and the edited model computes what the
unedited one does with r ablated at the same writers (methods 1.13). The Granular study (arXiv 2510.02768) leaves out the
embedding and the first block; what they write along r then stays in the stream (`stream_component`).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rsteer_interp.activations import last_states
from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Edit, Site
from rsteer_interp.batch import Tokens
from rsteer_interp.complete_folder import beside, held
from rsteer_interp.errors import UserError
from rsteer_interp.interventions import Affine, Everywhere, check_finite
from rsteer_interp.provenance import json_text
from rsteer_interp.weight_writers import Writer, find_writers, project

Which = Literal["all", "granular"]
RECORD = "orthogonalised.json"


def chosen(writers: Sequence[Writer], which: Which) -> tuple[Writer, ...]:
    """All writers, or those of the Granular study (arXiv 2510.02768): attention and MLP outputs of every block but the first."""
    if which == "all":
        return tuple(writers)
    return tuple(writer for writer in writers if writer.site.point != "resid_pre" and writer.site.layer > 0)


@torch.no_grad()
def orthogonalise(
    model: Any,
    direction: Float[Tensor, " d"],
    scale: float = 1.0,
    writers: Which | Sequence[Writer] = "all",
) -> tuple[Writer, ...]:
    """W <- W - scale r r^T W, r the direction's unit vector, in the given model, for its writers; returns those edited.

    Computed in float64, kept in each weight's dtype. A negative scale adds refusal. An unembedding that shares an edited
    weight gets a copy of its own before, and `config.tie_word_embeddings` says so. Nothing is changed where it raises.
    """
    width = int(model.config.get_text_config().hidden_size)
    length = float(direction.double().norm())
    if direction.shape != (width,) or not 0 < length < math.inf:
        raise UserError(
            f"a direction of shape {tuple(direction.shape)} and length {length:.3g} for a stream of width {width}; "
            "give a finite vector of that width"
        )
    check_finite("the scale of an orthogonalisation", scale)
    edited = chosen(find_writers(model), writers) if isinstance(writers, str) else tuple(writers)
    untie(model, {writer.name for writer in edited})
    parameters = dict(model.named_parameters())
    for writer in edited:
        parameter = parameters[writer.name]
        project(parameter, writer.axis, (direction.double() / length).to(parameter.device), scale)
    return edited


def untie(model: Any, edited: set[str]) -> None:
    """Give the unembedding a weight of its own where it is one of the `edited` parameters."""
    head = model.get_output_embeddings()
    names = {name for name, p in model.named_parameters() if head is not None and p is head.weight}
    if not names & edited or head.weight is not model.get_input_embeddings().weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def writer_ablation(direction: Float[Tensor, " d"], sites: Sequence[Site], scale: float = 1.0) -> Edit:
    """The activation edit that orthogonalising the writers at `sites` equals: h - scale <h, r> r at each of them."""
    return Everywhere({site: Affine(site, direction, kappa=scale) for site in sites})


def writer_sites(n_layers: int, which: Which = "all") -> list[Site]:
    """Where the writers of a decoder arrive: embeddings (not in "granular"), and every block's attention and MLP output."""
    first = 1 if which == "granular" else 0
    outputs = [Site(layer, point) for layer in range(first, n_layers) for point in ("attn_out", "mlp_out")]
    return outputs if which == "granular" else [Site(0), *outputs]


def stream_component(
    backend: Backend, rows: Sequence[Tokens], direction: Float[Tensor, " d"], edit: Edit | None = None
) -> dict[Site, float]:
    """Mean |<h, r>| / |h| at each prompt's last token, at every block input and the final norm's: 0 after a full edit."""
    unit = direction.double() / direction.double().norm()
    states = last_states(backend, rows, [Site(layer) for layer in range(backend.n_layers + 1)], edit)
    return {
        site: float(((h.double() @ unit.cpu()).abs() / h.double().norm(dim=-1)).mean()) for site, h in states.items()
    }


def save_checkpoint(model: Any, tokenizer: Any, folder: Path, record: Mapping[str, Any]) -> None:
    """An ordinary checkpoint folder (safetensors, config, tokenizer) with a record beside; complete or absent.

    It is written beside the folder and renamed. UserError where the folder exists and holds something, and for weights that
    are not finite.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(f"{name} is not finite, nothing was saved; edit with a smaller scale, or a wider dtype")
    with held(folder, ("config.json",), write=True) as place:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"'{folder}' exists already; name a new folder for the checkpoint, or delete it")
        partial = beside(place, "partial")
        try:
            partial.mkdir()
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / RECORD).write_text(json_text(record, "record") + "\n", encoding="utf-8")
            partial.rename(place)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = error.strerror or str(error)
            raise UserError(f"cannot write '{folder}': {reason}; make room, or name another folder") from None
