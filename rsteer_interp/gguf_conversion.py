"""Anybody's GGUF file as a safetensors folder in the cache: dequantised once through transformers, checked, kept.

Loading a GGUF of 0.5B parameters costs about 45 s, the safetensors folder under 2 s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsteer_interp.errors import CheckpointError
from rsteer_interp.gguf_facts import GgufFacts, check_all_read, check_blocks, take_rope
from rsteer_interp.library_messages import pass_on, quiet_libraries
from rsteer_interp.model_cache import is_disk_full, made_once, need_space, sha256, write_manifest
from rsteer_interp.progress import phase
from rsteer_interp.weight_files import files_fault
from rsteer_interp.weight_keys import check_keys, counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def folder_from_gguf(gguf: Path) -> Path:
    """A GGUF file as a safetensors folder, kept under the SHA-256 of its content."""
    if not gguf.is_file():
        raise CheckpointError(f"{gguf}: no such file; check the path of the GGUF file")
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{gguf}: not a GGUF file (it does not begin with 'GGUF'); download it again")
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", gguf.name):
        raise CheckpointError(f"{gguf}: one piece of a split GGUF; join the pieces with llama.cpp's gguf-split --merge")
    with phase(f"checking {gguf.name}"):
        digest = sha256(gguf)

    def make(staging: Path) -> Path:
        need_space(staging, 4 * sum(GgufFacts.read(gguf).tensors.values()), f"convert {gguf.name}")
        return convert(
            gguf, staging / "converted", name=gguf.stem, source=f"gguf:{gguf.name} sha256:{digest}", sha256=digest
        )

    return made_once(f"gguf-{digest[:16]}", make)


# transformers builds a tokenizer from a GGUF without the normalizer, and splits with GPT-2's rule when it does not know
# the pre-tokenizer that the file names. Both change token ids (NFD text; blanks before digits), so we put back what the
# official tokenizer.json of these families says.
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "qwen2": {"normalizer": {"type": "NFC"}},
    "smollm": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        }
    },
}
_PLACEHOLDER = re.compile(r"\[PAD\d+\]")  # llama.cpp fills the unused rows of the embedding with these


def convert(
    gguf: Path,
    folder: Path,
    *,
    name: str,
    source: str,
    sha256: str,
    special_tokens: Mapping[str, str | None] | None = None,
    eos_token_ids: tuple[int, ...] = (),
) -> Path:
    """Dequantise `gguf` into `folder`: fp32 safetensors, config, tokenizer with chat template, manifest last.

    fp32, because a product of an fp16 scale and a 4- to 8-bit integer does not fit 11 bits: fp16 would round. Checked
    before the manifest is written: every tensor of the file reached the model, and the model has no others.
    `special_tokens` and `eos_token_ids` are what the format cannot say.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    facts = GgufFacts.read(gguf)
    check_blocks(gguf, facts)
    with phase(f"converting {name} to safetensors (about a minute for 0.5B)"), quiet_libraries(bars=False) as said:
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model, info = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in `info`
            )
        except Exception as error:
            if is_disk_full(error):
                raise
            raise CheckpointError(
                f"{gguf}: transformers cannot read this GGUF ({_first_line(error)}); "
                "use a safetensors folder of the same model, or a newer transformers"
            ) from error
        _check_weights(gguf, facts, info, model)
        _forget_quantization(model)
        take_rope(gguf, facts, model.config)
        ends = [*eos_token_ids, *facts.turn_ends]
        model.generation_config.eos_token_id = list(dict.fromkeys(ends)) or model.generation_config.eos_token_id
        tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        for key, token in (special_tokens or {}).items():
            setattr(tokenizer, key, token)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _repair_tokenizer(folder, facts.pre_tokenizer)
    pass_on(name, said)
    if fault := files_fault(folder):
        raise CheckpointError(f"{name}: the converted weights are damaged: {fault}")
    write_manifest(folder, name=name, source=source, gguf_sha256=sha256)
    return folder


def _check_weights(gguf: Path, facts: GgufFacts, info: Mapping[str, Any], model: PreTrainedModel) -> None:
    check_keys(str(gguf), info, model)
    check_all_read(gguf, facts, model)
    wrong = [name for name, parameter in model.named_parameters() if not bool(parameter.isfinite().all())]
    if wrong:
        raise CheckpointError(f"{gguf}: {counted(wrong, 'not finite')}; download the file again")


def _forget_quantization(model: PreTrainedModel) -> None:
    """Make a dequantised model an ordinary one: `save_pretrained` refuses while these are set."""
    for owner, name in (
        (model.config, "quantization_config"),
        (model.config, "_model_name_or_path"),  # the GGUF's title, which is no path
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
    ):
        if name in vars(owner):
            delattr(owner, name)


def _repair_tokenizer(folder: Path, pre_tokenizer: str | None) -> None:
    """Bring a saved tokenizer back to the official one: normalizer, pre-tokenizer, no placeholder tokens."""
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved.update(_PRE_TOKENIZERS.get(pre_tokenizer or "", {}))
    vocabulary = saved["model"]["vocab"]
    if isinstance(vocabulary, dict):  # a list of pieces with scores in unigram models, which is left alone
        saved["model"]["vocab"] = {token: n for token, n in vocabulary.items() if not _PLACEHOLDER.fullmatch(token)}
    path.write_text(json.dumps(saved, ensure_ascii=False, indent=1, allow_nan=False), encoding="utf-8")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
