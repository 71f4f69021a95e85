"""A CUDA device computes what the CPU computes. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tower import TextTower
from fedprompt.config.schema import TrainingConfig
from tests.support.builders import CLASS_NAMES, random_clip
from tests.test_training import build, clients, relative, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def cuda_clip() -> FrozenCLIP:
    on_cpu = random_clip()
    return FrozenCLIP(
        on_cpu.model, on_cpu.tokenizer, name="random", weights_hash="seed 0", device="cuda"
    )


def test_block_training_equals_the_cpu(cuda_clip: FrozenCLIP) -> None:
    config = TrainingConfig(lr=0.05, batch_size=16)
    cpu_clip = random_clip()
    for name in ("fedrsclip", "promptfl", "coop_local"):
        ours = train(build(cuda_clip, name), clients(cuda_clip), config)
        cpu = train(build(cpu_clip, name), clients(cpu_clip), config)
        for a, b in zip(ours, cpu, strict=True):
            for mine, theirs in ((a.shared, b.shared), (a.private, b.private)):
                for key in theirs:
                    assert mine[key].device.type == "cpu"
                    assert relative(mine[key], theirs[key]) < 1e-3


def test_image_features_equal_the_cpu(cuda_clip: FrozenCLIP) -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    on_cpu = random_clip().encode_images(images)
    assert relative(cuda_clip.encode_images(images), on_cpu) < 1e-3


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_text_tower_equals_the_cpu(precision: str) -> None:
    on_cpu = random_clip()
    on_gpu = FrozenCLIP(
        random_clip().model,
        on_cpu.tokenizer,
        name="random",
        weights_hash="0",
        device="cuda",
        precision=precision,
    )
    values = []
    for clip in (on_gpu, on_cpu):
        context = 0.02 * torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0))
        context = context.to(clip.device).requires_grad_()
        features = TextTower(clip, CLASS_NAMES, 4)(context)
        gradient = torch.autograd.grad(features.square().sum(), context)[0]
        values.append((features.detach().cpu(), gradient.cpu()))
    limit = 1e-3 if precision == "float32" else 0.1
    for ours, expected in zip(*values, strict=True):
        assert relative(ours, expected) < limit
