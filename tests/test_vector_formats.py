"""Vector files: round trips to the bit, what other programs would read, what is added where, and hostile files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from rsteer_interp.backends.base import Backend
from rsteer_interp.backends.edits import Site
from rsteer_interp.directions import Direction, MeanDifference, fit_directions
from rsteer_interp.errors import UserError
from rsteer_interp.gates import Gate
from rsteer_interp.provenance import Provenance
from rsteer_interp.steering import Steering, make_steering
from rsteer_interp.vector_codecs import Vectors
from rsteer_interp.vector_file import unpacked
from rsteer_interp.vector_formats import Format, added_by, load_vectors, save_vectors
from tests.planted import planted
from tests.tiny_models import D_MODEL, N_LAYERS, tiny_backend, tiny_rows

FOREIGN: tuple[tuple[Format, str], ...] = (
    ("gguf", "v.gguf"),
    ("repeng", "v.gguf"),
    ("steering-vectors", "v.safetensors"),
    ("steering-vectors", "v.json"),
    ("tensor", "v.npy"),
    ("tensor", "v.safetensors"),
)
SITES = (Site(2), Site(3), Site(4))


@pytest.fixture(scope="module")
def backend() -> Backend:
    return tiny_backend("llama")


def some(alpha: float = -0.7, sites: tuple[Site, ...] = SITES, **options: Any) -> Steering:
    g = torch.Generator().manual_seed(1)
    return make_steering(
        "wrmd",
        {site: torch.randn(D_MODEL, generator=g) for site in sites},
        {site: torch.randn(D_MODEL, generator=g) for site in sites},
        {site: (1.3 + i, 2.1 + i) for i, site in enumerate(sites)},
        sites,
        alpha=alpha,
        reposition=False,
        refusal_tokens=(3, 5),
        **options,
    )


def logits(backend: Backend, steering: Steering) -> Tensor:
    return backend.logits(backend.batch(tiny_rows(backend)), steering.edit(), keep=2)


@pytest.mark.parametrize("alpha", [-0.7, 0.4])
@pytest.mark.parametrize(("format", "name"), FOREIGN)
def test_round_trips(format: Format, name: str, alpha: float, backend: Backend, tmp_path: Path) -> None:
    """The file's float32 vectors come back to the bit, the sign with them, and the model answers the same."""
    steering = some(alpha)
    save_vectors(tmp_path / name, steering, format, n_layers=N_LAYERS)
    read = load_vectors(tmp_path / name, backend=backend)
    wanted = added_by(steering)
    got = added_by(read)
    assert got.added.keys() == wanted.added.keys()
    assert all(torch.equal(got.added[site], v) for site, v in wanted.added.items())
    save_vectors(tmp_path / f"again_{name}", read, format, n_layers=N_LAYERS)
    again = load_vectors(tmp_path / f"again_{name}")
    assert all(torch.equal(added_by(again).added[site], v) for site, v in wanted.added.items())
    for site, amount in read.amounts.items():
        assert amount == pytest.approx(steering.amounts[site] if format != "tensor" else abs(steering.amounts[site]))
    torch.testing.assert_close(logits(backend, read), logits(backend, steering), atol=1e-4, rtol=1e-4)
    directions = torch.stack([v / v.norm() for v in steering.directions.double()])
    flip = -1 if format == "tensor" and alpha < 0 else 1  # a plain tensor does not say which way it points
    torch.testing.assert_close(read.directions, flip * directions, atol=1e-6, rtol=0)


def test_sign_says_which_way_and_changes_nothing_that_is_added(backend: Backend, tmp_path: Path) -> None:
    save_vectors(tmp_path / "v.npy", some(), "tensor")
    towards = load_vectors(tmp_path / "v.npy")
    away = load_vectors(tmp_path / "v.npy", sign=-1)
    assert (towards.alpha, away.alpha) == (1.0, -1.0)
    assert torch.equal(away.directions, -towards.directions)
    torch.testing.assert_close(logits(backend, towards), logits(backend, away), atol=1e-6, rtol=0)
    half = load_vectors(tmp_path / "v.npy", sign=-1, strength=0.5)
    assert half.amounts == {site: 0.5 * amount for site, amount in away.amounts.items()}
    save_vectors(tmp_path / "v.gguf", some(), "gguf")
    assert load_vectors(tmp_path / "v.gguf").alpha == -1.0  # it was written for removal, and says so
    with pytest.raises(UserError, match=r"says itself which way its vectors point \(-1\)"):
        load_vectors(tmp_path / "v.gguf", sign=1)


@pytest.mark.parametrize("kind", ["steering", "gated", "directions"])
def test_our_own_file_keeps_everything(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    if kind == "directions":
        evidence = {site: planted(40, 12, site.layer)[0] for site in (Site(1), Site(3))}
        found = fit_directions(MeanDifference(), evidence, sets=("a", "b"), fingerprint="abc")
        save_vectors(path, found)
        read = unpacked(path)
        assert isinstance(read, dict)
        assert all(read[s].record() == d.record() and torch.equal(read[s].vector, d.vector) for s, d in found.items())
        assert all(torch.equal(read[s].offset, d.offset) for s, d in found.items())
        steering = load_vectors(path, strength=-0.5)
        assert steering.amounts == {site: -0.5 * d.length for site, d in found.items()}
        assert steering.fingerprint == "abc"
        return
    gate = Gate(Site(1), torch.randn(D_MODEL).double(), 0.25, "cosine", "instruction") if kind == "gated" else None
    original = replace(some(fingerprint="abc", gate=gate, while_decoding=gate is None), reposition=True)
    save_vectors(path, original)
    first = path.read_bytes()
    path.unlink()
    save_vectors(path, original)
    assert path.read_bytes() == first
    got = load_vectors(path)
    for name in ("method", "sites", "scales", "alpha", "reposition", "refusal_tokens", "fingerprint", "while_decoding"):
        assert getattr(got, name) == getattr(original, name)
    assert torch.equal(got.directions, original.directions)
    assert torch.equal(got.references, original.references)
    if gate is not None:
        assert got.gate is not None
        assert torch.equal(got.gate.direction, gate.direction)
        assert (got.gate.site, got.gate.threshold, got.gate.pooling) == (gate.site, gate.threshold, gate.pooling)


def test_the_header_says_what_the_numbers_are(tmp_path: Path) -> None:
    save_vectors(tmp_path / "v.safetensors", some(fingerprint="abc"))
    with safetensors.safe_open(tmp_path / "v.safetensors", "pt") as file:
        header = json.loads(file.metadata()["rsteer"])
    assert header["sites"] == ["blocks.2.hook_resid_pre", "blocks.3.hook_resid_pre", "blocks.4.hook_resid_pre"]
    assert (header["sign"], header["fingerprint"]) == ("complying to refusing", "abc")
    assert header["units"].startswith("residual stream")


def test_a_steering_folder_is_read_too(backend: Backend, tmp_path: Path) -> None:
    steering = some(fingerprint=backend.fingerprint)
    steering.save(tmp_path / "s", Provenance.collect(backend))
    assert load_vectors(tmp_path / "s", backend=backend, strength=2.0).amounts == {
        site: 2 * amount for site, amount in steering.amounts.items()
    }


def test_a_control_vector_is_what_llama_cpp_loads(tmp_path: Path) -> None:
    """Architecture, keys and names; float32 vectors of one width; index i is the block whose output is changed."""
    steering = some()
    save_vectors(tmp_path / "v.gguf", steering, "gguf", model_hint="qwen2")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "qwen2"
    assert fields["controlvector.layer_count"] == 3
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.2", "direction.3"]
    for tensor, vector in zip(reader.tensors, added_by(steering).added.values(), strict=True):
        assert tensor.tensor_type.name == "F32"
        assert tensor.data.shape == (D_MODEL,)
        assert np.array_equal(tensor.data, vector.numpy())


def test_direction_0_is_repengs_alone(tmp_path: Path) -> None:
    steering = some(sites=(Site(1), Site(2)))
    with pytest.raises(UserError, match=r"blocks\.1\.hook_resid_pre has no place in this format.*use repeng or rsteer"):
        save_vectors(tmp_path / "v.gguf", steering, "gguf")
    assert list(tmp_path.iterdir()) == []
    save_vectors(tmp_path / "v.gguf", steering, "repeng")
    assert [t.name for t in gguf.GGUFReader(tmp_path / "v.gguf").tensors] == ["direction.0", "direction.1"]
    assert load_vectors(tmp_path / "v.gguf").sites == (Site(1), Site(2))


@pytest.mark.parametrize("layer", [0, N_LAYERS - 1])
def test_a_foreign_layer_is_a_blocks_output(layer: int, backend: Backend, tmp_path: Path) -> None:
    """Adding by a plain hook on the block, as repeng and steering-vectors do, is what the imported configuration does."""
    vector = 3 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2))
    name = f"layer_activations.{layer}"
    safetensors.torch.save_file({name: vector}, tmp_path / "v.safetensors", {"layer_type": "decoder_block"})
    batch = backend.batch(tiny_rows(backend))
    hook = backend.model.model.layers[layer].register_forward_hook(
        lambda module, args, output: (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector
    )
    wanted = backend.logits(batch, keep=2)
    hook.remove()
    edit = load_vectors(tmp_path / "v.safetensors", backend=backend).edit()
    torch.testing.assert_close(backend.logits(batch, edit, keep=2), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "point"), [("self_attn", "attn_out"), ("mlp", "mlp_out")])
def test_other_layer_types(kind: str, point: Literal["attn_out", "mlp_out"], backend: Backend, tmp_path: Path) -> None:
    content = {"layer_type": kind, "layer_activations": {"2": [0.5] * D_MODEL}}
    (tmp_path / "v.json").write_text(json.dumps(content))
    read = load_vectors(tmp_path / "v.json", backend=backend)
    assert read.sites == (Site(2, point),)
    save_vectors(tmp_path / "w.json", read, "steering-vectors")
    assert json.loads((tmp_path / "w.json").read_text())["layer_activations"] == content["layer_activations"]


def test_plain_tensors_need_to_know_their_layer(backend: Backend, tmp_path: Path) -> None:
    rows = torch.randn(N_LAYERS, D_MODEL)
    np.save(tmp_path / "all.npy", rows.numpy())
    np.save(tmp_path / "one.npy", rows[1].numpy().astype(np.float16))
    assert load_vectors(tmp_path / "all.npy", backend=backend).sites == tuple(Site(i) for i in range(N_LAYERS))
    assert load_vectors(tmp_path / "all.npy", backend=backend, at="output").sites == tuple(
        Site(i + 1) for i in range(N_LAYERS)
    )
    assert load_vectors(tmp_path / "all.npy", layer=2).sites == (Site(2),)
    assert load_vectors(tmp_path / "one.npy", layer=2, at="output").sites == (Site(3),)
    with pytest.raises(UserError, match="say at which layer"):
        load_vectors(tmp_path / "one.npy")
    with pytest.raises(UserError, match="no row 9"):
        load_vectors(tmp_path / "all.npy", layer=9)


def test_zeros_are_left_out(tmp_path: Path) -> None:
    rows = torch.zeros(N_LAYERS, D_MODEL)
    safetensors.torch.save_file({"v": rows}, tmp_path / "zero.safetensors")
    with pytest.raises(UserError, match="add nothing"):
        load_vectors(tmp_path / "zero.safetensors")
    rows[2, 5] = 1.0
    safetensors.torch.save_file({"v": rows}, tmp_path / "one.safetensors")
    assert load_vectors(tmp_path / "one.safetensors").sites == (Site(2),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reposition": True}, "repositions"),
        ({"gate": Gate(Site(1), torch.ones(D_MODEL), 0.0)}, "has a gate"),
        ({"while_decoding": False}, "leaves generated tokens alone"),
        ({"alpha": 0.0}, "adds nothing"),
    ],
)
def test_what_a_control_vector_cannot_say_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        save_vectors(tmp_path / "v.gguf", replace(some(), **change), "gguf")
    save_vectors(tmp_path / "v.safetensors", replace(some(), **change))
    assert load_vectors(tmp_path / "v.safetensors").reposition is change.get("reposition", False)


def test_other_models_are_refused(backend: Backend, tmp_path: Path) -> None:
    save_vectors(tmp_path / "ours.safetensors", some(fingerprint="another"))
    with pytest.raises(UserError, match="made for another model"):
        load_vectors(tmp_path / "ours.safetensors", backend=backend)
    assert load_vectors(tmp_path / "ours.safetensors", backend=backend, other_model=True).sites == SITES
    safetensors.torch.save_file({"v": torch.ones(N_LAYERS, 7)}, tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match="width 7, this one has 32"):
        load_vectors(tmp_path / "narrow.safetensors", backend=backend)
    safetensors.torch.save_file({"v": torch.ones(9, D_MODEL)}, tmp_path / "deep.safetensors")
    with pytest.raises(UserError, match="9 rows for a model of 4 blocks"):
        load_vectors(tmp_path / "deep.safetensors", backend=backend)
    write_gguf(tmp_path / "deep.gguf", {"direction.4": np.ones(D_MODEL, np.float32)})
    with pytest.raises(UserError, match=r"blocks\.5\.hook_resid_pre, which is no site of this model of 4 blocks"):
        load_vectors(tmp_path / "deep.gguf", backend=backend)


def write_gguf(path: Path, tensors: dict[str, np.ndarray], architecture: str = "controlvector") -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ONE = np.ones(D_MODEL, np.float32)
NAN = np.full(D_MODEL, np.nan, np.float32)


def _bytes(content: bytes) -> Callable[[Path], int]:
    return lambda path: path.write_bytes(content)


def _ours(**change: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        save_vectors(path, some())
        with safetensors.safe_open(path, "pt") as file:
            header, tensors = json.loads(file.metadata()["rsteer"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        header |= {k: v for k, v in change.items() if k != "vectors"}
        tensors |= {k: v for k, v in change.items() if k == "vectors"}
        safetensors.torch.save_file(tensors, path, {"rsteer": json.dumps(header)})

    return write


class Evil:
    """What runs code when somebody unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled!",)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: torch.save({"layer_activations": {3: torch.ones(D_MODEL)}}, p), "is a pickle"),
        (_bytes(pickle.dumps(Evil())), "is a pickle"),
        (lambda p: np.savez(p.open("wb"), v=ONE), "is a pickle, or a zip of them"),
        (lambda p: np.save(p.open("wb"), np.array([Evil()], dtype=object), allow_pickle=True), "without pickle"),
        (_bytes(b""), "is no vector file"),
        (_bytes(b"hello"), "is no vector file"),
        (_bytes(b"GGUF"), "damaged GGUF"),
        (_bytes(b"GGUF" + b"\xff" * 60), "damaged GGUF"),
        (lambda p: write_gguf(p, {"direction.1": ONE}, "llama"), "architecture 'llama', not a controlvector"),
        (lambda p: write_gguf(p, {}), "none at all"),
        (lambda p: write_gguf(p, {"direction.1": NAN}), "not finite"),
        (lambda p: write_gguf(p, {"direction.one": ONE}), r"'direction\.one' \(F32\) is no direction"),
        (lambda p: write_gguf(p, {"direction.1": ONE.astype(np.float16)}), r"\(F16\) is no direction"),
        (lambda p: write_gguf(p, {"direction.1": ONE, "direction.2": ONE[:5]}), r"shape \(32,\), \(5,\)|shape \(5,\)"),
        (lambda p: write_gguf(p, {"direction.1": np.stack([ONE, ONE])}), r"shape \(2, 32\)"),
        (lambda p: write_gguf(p, {"direction.4000000000": ONE}), "no site"),
        (_bytes(b'{"layer_activations": [1, 2]}'), "no JSON of layer_activations"),
        (_bytes(b'{"layer_activations": {"3": [1.0, NaN]}}'), "not finite"),
        (_bytes(b'{"layer_activations": {"-3": [1.0, 2.0]}}'), "'-3' is no layer"),
        (_bytes(b'{"layer_activations": {"3": ["a"]}}'), "no JSON of layer_activations"),
        (_bytes(b'{"layer_activations": {"3": [1.0]}, "layer_type": ["mlp"]}'), "layer type"),
        (_bytes(b'{"layer_activations": {"3": [1.0]}, "layer_type": "input_layernorm"}'), "known are decoder_block"),
        (lambda p: np.save(p.open("wb"), np.arange(8)), "int64 values"),
        (lambda p: np.save(p.open("wb"), np.ones((2, 3, 4), np.float32)), r"shape \(2, 3, 4\)"),
        (lambda p: safetensors.torch.save_file({"a": torch.ones(3), "b": torch.ones(3)}, p), "holds 2 tensors"),
        (lambda p: safetensors.torch.save_file({"a": torch.ones(3, 4).long()}, p), "torch.int64 values"),
        (lambda p: safetensors.torch.save_file({"a": torch.full((3, 4), torch.inf)}, p), "not finite"),
        (_ours(sites=["blocks.2.hook_resid_pre"]), r"'vectors' is of shape \(3, 32\) for 1 sites"),
        (_ours(sites=["layer 2"] * 3), "is not a site"),
        (_ours(vectors=torch.full((3, D_MODEL), torch.nan)), "'vectors' holds values that are not finite"),
        (_ours(sign="the other way"), "header: sign"),
        (_ours(format=2), "header: format"),
        (_ours(steering=None), "does not describe as many"),
    ],
)
def test_hostile_files_are_one_line(
    write: Callable[[Path], Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "file")
    with pytest.raises(UserError, match=message) as error:
        load_vectors(tmp_path / "file")
    assert "\n" not in str(error.value)
    assert "unpickled" not in capsys.readouterr().out


def test_safetensors_are_known_whatever_their_length_looks_like(tmp_path: Path) -> None:
    """A header of 128 bytes begins with the byte of a pickle, one of 0x4b50 with that of a zip."""
    for length in (128, 0x4B50):
        notes = ("x" * n for n in range(length - 120, length))
        files = (safetensors.torch.save({"v": torch.ones(3, 4)}, {"note": note}) for note in notes)
        content = next(file for file in files if int.from_bytes(file[:8], "little") == length)
        (tmp_path / f"{length}").write_bytes(content)
        assert load_vectors(tmp_path / f"{length}").sites == (Site(0), Site(1), Site(2))


def test_nothing_is_overwritten_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists already"):
        save_vectors(tmp_path / "v.gguf", some(), "gguf")
    assert (tmp_path / "v.gguf").read_bytes() == b"mine"
    with pytest.raises(UserError, match="No such file"):
        load_vectors(tmp_path / "nowhere.gguf")
    save_vectors(tmp_path / "new" / "folder" / "v.gguf", some(), "gguf")
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["v.gguf"]


def test_a_flipped_sign_would_be_seen() -> None:
    steering = some(-0.7)
    added = added_by(steering)
    assert added.sign == -1
    for site, direction in zip(steering.sites, steering.directions, strict=True):
        assert float(added.added[site] @ direction) < 0
    assert isinstance(added, Vectors)
    directions = {s: Direction(2 * torch.ones(4), s, "md", {}, (), {}, "", torch.zeros(4), "midpoint") for s in SITES}
    assert added_by(directions).sign == 1
