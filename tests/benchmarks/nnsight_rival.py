"""nnsight tracing the same states, by a Python of its own: `PYTHON nnsight_rival.py MODEL_FOLDER BATCH_FILE STATES_FILE`.

Imports nothing of this project. Traces once and writes the states; then once more for every line on standard input, and prints
the seconds. The model is read as transformers reads it, attention and linear layers as they come.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import nnsight
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, batch_file: str, states_file: str) -> None:
    batch = load_file(batch_file)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    lens = nnsight.LanguageModel(model, tokenizer=AutoTokenizer.from_pretrained(folder, local_files_only=True))
    inputs = {"input_ids": batch["ids"], "attention_mask": batch["mask"].long()}
    options = {"position_ids": batch["positions"], "use_cache": False, "logits_to_keep": 1}

    def trace() -> list[Any]:
        kept: list[Any] = []
        with torch.inference_mode(), lens.trace(inputs, **options):
            states = nnsight.save([])
            for layer in lens.model.layers:
                states.append(layer.input[:, -1].clone())
            states.append(lens.model.layers[-1].output[:, -1].clone())
        kept.extend(states)
        return kept

    save_file({"states": torch.stack(trace()).contiguous()}, states_file)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        trace()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
