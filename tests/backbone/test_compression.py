"""Weights in fewer bits: the numbers kept, and every pass through them against the dense numbers.

The twin is the same architecture with open_clip's own modules, which hold the dense matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from torch import Tensor

from fedprompt.backbone.architecture import adopt_weights
from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.compression import AS_TRAINED, MARK, Compression, compress, weight_bytes
from fedprompt.backbone.kept_modules import KeptAttention, KeptEmbedding, KeptLinear
from fedprompt.backbone.loading import load_clip
from fedprompt.backbone.matrices import KeptMatrix
from fedprompt.backbone.patch_features import dense_encoder, local_encoder
from fedprompt.backbone.text_tower import TextTower
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.config.schema import BackboneConfig
from tests.support.builders import CLASS_NAMES, RANDOM_CLIP
from tests.support.small_models import TEXTS, as_safetensors, copies, images, load, refused, weights

FORMATS = [
    Compression("bf16"),
    Compression("fp16"),
    Compression("int8"),
    Compression("int4"),
    Compression("float32", pruned=0.5),
]
QUICK = {"quick_gelu": True}


def _clip(
    state: dict[str, Tensor], precision: str = "float32", compression: Compression = AS_TRAINED
) -> FrozenCLIP:
    with torch.device("meta"):
        model = CLIP(**RANDOM_CLIP, **QUICK)
    adopt_weights(model, state)
    return FrozenCLIP(
        model,
        open_clip.SimpleTokenizer(),
        name="random",
        weights_hash="seed 0",
        precision=precision,
        compression=compression,
    )


@cache
def _start() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIP(**RANDOM_CLIP, **QUICK).state_dict()


@cache
def _small(compression: Compression) -> dict[str, Tensor]:
    if compression.weights in ("int8", "int4"):
        pytest.importorskip("torchao", reason="needs the extra 'quant'")
    with torch.device("meta"):
        model = CLIP(**RANDOM_CLIP, **QUICK)
    return compress(model, _start(), compression)


def _dense(small: dict[str, Tensor]) -> dict[str, Tensor]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in small.items():
        name, _, part = key.partition(MARK)
        parts.setdefault(name, {})[part] = tensor
    return {n: p[""] if "" in p else KeptMatrix.of(p).dense() for n, p in parts.items()}


@pytest.fixture(scope="module", params=FORMATS, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[FrozenCLIP, FrozenCLIP]:
    """The model in a small form, and its twin."""
    small = _small(request.param)
    return _clip(small, compression=request.param), _clip(_dense(small))


def test_numbers_are_rounded_to_the_nearest() -> None:
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    w = _start()[name]
    dense = _dense(_small(Compression("int8")))[name]
    step = w.abs().amax(1, keepdim=True) / 127
    assert ((dense - w).abs() <= step * 0.501).all()
    # The largest number of a row is exact.
    torch.testing.assert_close(dense.abs().amax(1), w.abs().amax(1))
    dense = _dense(_small(Compression("int4")))[name]
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    assert ((dense - w).abs() <= (high - low) / 15 * 1.001).all()
    assert max(len(row.unique()) for row in dense) == 16


def test_pruning_leaves_the_largest_numbers() -> None:
    name = "transformer.resblocks.0.attn.in_proj_weight"
    small = _small(Compression("float32", pruned=0.75))
    w, found = _start()[name], small[name]
    kept = found != 0
    assert kept.double().mean() == pytest.approx(0.25, abs=1e-3)
    assert torch.equal(found[kept], w[kept])
    assert w[kept].abs().min() >= w[~kept].abs().max()
    assert torch.equal(small["token_embedding.weight"], _start()["token_embedding.weight"])


def test_what_is_kept_small() -> None:
    clip = _clip(_small(Compression("int4")))
    block = clip.model.visual.transformer.resblocks[0]
    assert isinstance(block.attn, KeptAttention)
    assert isinstance(block.mlp.c_fc, KeptLinear)
    assert isinstance(clip.model.token_embedding, KeptEmbedding)
    # Looked up, not summed: eight bits.
    assert clip.model.token_embedding.matrix.data.dtype == torch.int8
    assert block.attn.matrix.data.shape == (3 * 64, 32)
    whole = weight_bytes(_clip(_start()).model)
    sizes = [weight_bytes(_clip(_small(f)).model) / whole for f in FORMATS[:3]]
    assert sizes[0] == sizes[1] == pytest.approx(0.5, abs=0.02)
    assert sizes[2] == pytest.approx(0.27, abs=0.02)


def test_features(pair: tuple[FrozenCLIP, FrozenCLIP]) -> None:
    found, twin = pair
    torch.testing.assert_close(found.encode_images(images()), twin.encode_images(images()))
    torch.testing.assert_close(found.encode_text_raw(TEXTS), twin.encode_text_raw(TEXTS))
    torch.testing.assert_close(found.encode_texts(TEXTS), twin.encode_texts(TEXTS))
    for encoder in (dense_encoder, local_encoder):
        patches, expected = encoder(found), encoder(twin)
        assert patches is not None
        assert expected is not None
        torch.testing.assert_close(patches[0](images()), expected[0](images()))


def _text(position: str, **options: bool) -> Callable[[FrozenCLIP, Tensor, Tensor], Tensor]:
    def encode(clip: FrozenCLIP, prompts: Tensor, deep: Tensor) -> Tensor:
        tower = TextTower(clip, CLASS_NAMES, 4, position=position, **options)  # type: ignore[arg-type]
        assert tower.fast
        return tower(prompts, deep)

    return encode


def _plain(clip: FrozenCLIP, prompts: Tensor, deep: Tensor) -> Tensor:
    tower = TextTower(clip, CLASS_NAMES, 4)
    tower.fast, tower.transformer = False, None
    return tower(prompts, deep)


def _visual(clip: FrozenCLIP, prompts: Tensor, deep: Tensor) -> Tensor:
    tower = VisionTower(clip)
    assert tower.fast
    return tower(images()[None], prompts, deep)


def _visual_plain(clip: FrozenCLIP, prompts: Tensor, deep: Tensor) -> Tensor:
    tower = VisionTower(clip)
    tower.fast = False
    return tower(images()[None], prompts, deep)


PASSES = {
    "packed": _text("end"),
    "sequences": _text("middle"),
    "plain text": _plain,
    "visual": _visual,
    "plain visual": _visual_plain,
}


def _gradients(clip: FrozenCLIP, name: str) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randn(1, 4, 64, generator=draw).requires_grad_()
    deep = torch.randn(1, 1, 4, 64, generator=draw).requires_grad_()
    features = PASSES[name](clip, prompts, deep)
    weights_of = torch.randn(features.shape, generator=draw)
    return [features, *torch.autograd.grad((features * weights_of).sum(), [prompts, deep])]


@pytest.mark.parametrize("name", PASSES)
def test_values_and_gradients(pair: tuple[FrozenCLIP, FrozenCLIP], name: str) -> None:
    found, expected = (_gradients(clip, name) for clip in pair)
    assert all(t.dtype == torch.float32 for t in found)
    for mine, twins in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, twins, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PASSES)
def test_products_in_bfloat16(name: str) -> None:
    """`backbone.precision` is independent of how the weights are kept."""
    small = _small(Compression("int8"))
    found, expected = (_gradients(_clip(s, "bf16"), name) for s in (small, _dense(small)))
    for mine, twins in zip(found, expected, strict=True):
        assert (mine - twins).norm() <= 0.05 * twins.norm()


@pytest.mark.parametrize("name", PASSES)
def test_no_dense_matrix_is_kept_for_the_gradient(name: str) -> None:
    clip = _clip(_small(Compression("int8")))
    saved: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float32:
            saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _gradients(clip, name)
    matrices = {(192, 64), (256, 64), (64, 256), (64, 192)}
    assert not matrices & {tuple(shape) for shape in saved}


def test_the_fingerprint_tells_the_formats_apart() -> None:
    clips = [_clip(_small(f), compression=f) for f in FORMATS]
    assert len({clip.fingerprint for clip in (*clips, _clip(_start()))}) == len(FORMATS) + 1


def test_the_embedded_backbone_in_int8(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="needs the extra 'quant'")
    plain = load_clip(BackboneConfig(device="cpu"), tmp_path)
    clip = load_clip(BackboneConfig(device="cpu", weights="int8"), tmp_path)
    found, whole = clip.encode_texts(TEXTS), plain.encode_texts(TEXTS)
    assert torch.cosine_similarity(found, whole).min() > 0.999
    assert not torch.equal(found, whole)


@pytest.mark.usefixtures("small_models")
class TestFiles:
    def test_the_small_form_is_made_once_and_mapped(self, tmp_path: Path) -> None:
        source = as_safetensors(tmp_path / "weights", weights("small-vit"))
        first = load("small-vit", source, tmp_path, weights="bf16", pruned=0.5)
        (copy,) = copies(tmp_path)
        assert "bf16" in copy.name
        stamp = copy.stat().st_mtime_ns
        again = load("small-vit", source, tmp_path, weights="bf16", pruned=0.5)
        assert copies(tmp_path) == [copy]
        assert copy.stat().st_mtime_ns == stamp
        assert torch.equal(first.encode_texts(TEXTS), again.encode_texts(TEXTS))
        other = load("small-vit", source, tmp_path, weights="bf16", pruned=0.25)
        assert len(copies(tmp_path)) == 2
        assert other.fingerprint != again.fingerprint

    @pytest.mark.parametrize("name", ["small-last", "small-coca", "small-rn"])
    def test_other_towers(self, name: str, tmp_path: Path) -> None:
        source = as_safetensors(tmp_path / "weights", weights(name))
        clip, whole = (load(name, source, tmp_path, weights=f) for f in ("bf16", "float32"))
        for found, expected in (
            (clip.encode_images(images()), whole.encode_images(images())),
            (clip.encode_texts(TEXTS), whole.encode_texts(TEXTS)),
        ):
            assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.999

    def test_without_the_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        line = refused(lambda: load("small-vit", tmp_path / "no file", tmp_path, weights="int8"))
        assert "torchao" in line
        assert "fedprompt[quant]" in line
