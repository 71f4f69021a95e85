"""Everything that a short visit to a GPU should check and measure, in under five minutes.

    python scripts/gpu_check.py                 # a GPU; `--device cpu` for a small version
    python scripts/gpu_check.py --only towers speed

It needs PyTorch, fedprompt and its dependencies, and no network: backbones have random weights, or
are the embedded tiny CLIP. Every check stands alone, so one that fails does not hide the others,
and the JSON file is written after each. The exit status is 1 if a check has failed. `methods`, the
longest, is last and stops when the time is up.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fedprompt.runtime import set_defaults

# Before torch is imported, which reads them.
set_defaults()

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.devices import ordered_sums, pick_device
from fedprompt.backbone.text_tower import TextTower
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.bench.backbones import random_clip, random_images
from fedprompt.bench.class_lists import class_names
from fedprompt.bench.compare import clock, max_rel_diff
from fedprompt.bench.estimates import EstimateOptions, workspace_of
from fedprompt.bench.machine import machine
from fedprompt.config.schema import BackboneConfig, Config
from fedprompt.errors import StopRun
from fedprompt.experiment import run as experiment
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.validate import validate
from fedprompt.experiment.workspaces import ResourceCache, open_workspace
from fedprompt.federation.server_app import Federation
from fedprompt.methods.base import Batch, Tensors
from fedprompt.methods.parts.step_graphs import StepGraphs
from fedprompt.methods.promptfl import PromptFL
from fedprompt.methods.registry import all_methods
from fedprompt.reports.run_data import PROMPTS, SUMMARY
from fedprompt.runtime.step_recorder import CudaRecorder
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.step_memory import step_memory
from fedprompt.training import LocalResult, train_clients
from fedprompt.workspace import Workspace

PRECISIONS: tuple[str, ...] = get_args(get_type_hints(BackboneConfig)["precision"])
LIMITS = {"float32": 2e-3, "tf32": 2e-2, "bf16": 0.15}
"""Largest accepted difference of a tower from the CPU's float32, relative to the largest value."""
ORDERED = ("promptfl", "fedrsclip", "fedpha")
"""Methods that promise equal bits without `backbone.deterministic`, since they use no fused
attention; docs/gpu.md lists those that do."""
UNORDERED = ("coop_csc", "proda", "vpt", "maple")
ESTIMATED = ("promptfl", "fedrsclip", "coop_csc", "plot", "fedotp", "vpt", "maple")


class Skip(Exception):
    """Why a check has nothing to do on this device."""


class Visit:
    """One run of the script: the device, the sizes, and the facts of the current check.

    Args:
        device: `cpu` or `cuda`.
        out: the folder of runs, cache and results.
        minutes: after so many minutes, `methods` starts no further method.
    """

    def __init__(self, device: str, out: Path, minutes: float) -> None:
        self.device, self.out = device, out
        self.cuda = device == "cuda"
        # A new folder, so that an earlier visit with the same `out` is not in the way.
        self.runs = Path(tempfile.mkdtemp(prefix="runs-", dir=out))
        self.large = "ViT-B-16" if self.cuda else "tiny"
        self.ends = time.monotonic() + 60 * minutes
        self.facts: dict[str, Any] = {}
        self.opened = {name: ResourceCache() for name in ("cpu", device)}

    def only_cuda(self) -> None:
        """Skip the check on other devices."""
        if not self.cuda:
            raise Skip("only CUDA")


def expect(condition: bool, message: str) -> None:
    """Fail the check unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def seconds(call: Callable[[], Any], repeats: int = 3) -> float:
    """The shortest time of a call, after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        began = clock()
        call()
        times.append(clock() - began)
    return min(times)


def local_round(
    workspace: Workspace, clients: int, steps: int, graphs: StepGraphs | None = None
) -> Callable[[], list[LocalResult]]:
    """A call in which copies of a workspace's client train together for some epochs of a batch."""
    method, config = workspace.method, workspace.config
    received = method.init_shared(config.seed) | method.init_extras(config.seed)
    private, data = workspace.start_private(0), workspace.train_data(0)
    training = replace(config.training, local_epochs=steps)

    def call() -> list[LocalResult]:
        return train_clients(
            method,
            [received] * clients,
            [private] * clients,
            [replace(data, client=k) for k in range(clients)],
            training,
            seed=config.seed,
            server_round=1,
            rounds=5,
            graphs=graphs,
        )

    return call


def example(clip: FrozenCLIP, method: str, classes: int = 10, batch: int = 32) -> Workspace:
    """One client whose images are one batch."""
    return workspace_of(clip, method, EstimateOptions([method], clip.name, classes, batch, batch))


def config_of(device: str, method: str, **sections: Any) -> Config:
    """A small experiment on the embedded data and backbone."""
    raw: dict[str, Any] = {
        "experiment": "gpu_check",
        "seed": 1,
        "backbone": {"model": "tiny", "device": device},
        "data": {"images_per_class": 4, "domains": ["savanna", "highland"]},
        "partition": {"clients": 3, "alpha": 10.0},
        "method": {"name": method},
        "strategy": {"name": "auto"},
        "training": {"lr": 0.01, "batch_size": 8, "schedule": "constant"},
        "federation": {"rounds": 2},
        "evaluation": {"local_only": False},
        "output": {"report": False},
    }
    for key, value in sections.items():
        raw[key] = raw.get(key, {}) | value
    return validate(raw)


def tensors_of(results: list[LocalResult]) -> dict[str, Tensor]:
    """All tensors that clients have trained."""
    return {f"{r.client}/{n}": t for r in results for n, t in (r.shared | r.private).items()}


# The checks, in their order


def environment(visit: Visit) -> None:
    """What this is measured on."""
    visit.facts.update(machine(visit.device))
    visit.facts["float32_matmul_precision"] = torch.get_float32_matmul_precision()


def towers(visit: Visit) -> None:
    """Values and prompts' gradients of both towers are the CPU's, at every precision."""
    expected = _through_towers(random_clip(visit.large))
    for precision in PRECISIONS:
        clip = random_clip(visit.large, device=visit.device, precision=precision)
        found = _through_towers(clip)
        gaps = {n: max_rel_diff({n: found[n]}, {n: t}) for n, t in expected.items()}
        visit.facts[precision] = gaps
        expect(max(gaps.values()) < LIMITS.get(precision, 0.15), f"{precision}: {gaps}")


def _through_towers(clip: FrozenCLIP) -> dict[str, Tensor]:
    draw, vision = torch.Generator().manual_seed(0), VisionTower(clip)

    def prompts(*shape: int) -> Tensor:
        return (0.02 * torch.randn(*shape, generator=draw)).to(clip.device).requires_grad_()

    context, visual = prompts(2, 4, clip.text.width), prompts(2, 2, vision.width)
    pixels = random_images(clip, 4, seed=0).unflatten(0, (2, 2))
    text = F.normalize(TextTower(clip, class_names(7), 4)(context), dim=-1)
    image = F.normalize(vision(pixels.to(clip.device), visual), dim=-1)
    loss = (image @ text.transpose(-1, -2)).square().sum()
    d_context, d_visual = torch.autograd.grad(loss, (context, visual))
    return {"text": text, "image": image, "d_context": d_context, "d_visual": d_visual}


def whole_run(visit: Visit) -> None:
    """A run resumed after a round equals an uninterrupted one; Ray's workers agree with it."""

    class Stopping(QuietDisplay):
        def round(self, record: Mapping[str, Any], eta_s: float | None) -> None:
            raise StopRun

    def begin(name: str, display: QuietDisplay | None = None, **sections: Any) -> Path:
        config = config_of(visit.device, "fedrsclip", **sections)
        folder = str(visit.runs / name)
        config = replace(config, output=replace(config.output, dir=folder))
        return experiment.run(config, display or QuietDisplay(Console(quiet=True)))

    began = clock()
    whole = begin("whole")
    visit.facts["run_s"] = clock() - began
    part = begin("part", Stopping(Console(quiet=True)))
    experiment.resume(part, QuietDisplay(Console(quiet=True)))
    summary = json.loads((whole / SUMMARY).read_text())
    visit.facts.update(environment=summary["environment"], rejected=summary["rejected_replies"])
    expect(summary["rejected_replies"] == 0, "replies were rejected")
    equal = (part / PROMPTS).read_bytes() == (whole / PROMPTS).read_bytes()
    expect(equal, "a resumed run differs from a whole one")
    if not visit.cuda:
        return
    blocks = {"threads": 1, "clients_per_block": 2}
    alone = begin("blocks", simulation=blocks)
    began = clock()
    spread = begin("ray", simulation={**blocks, "kind": "ray", "workers": 2})
    visit.facts["ray_s"] = clock() - began
    equal = (spread / PROMPTS).read_bytes() == (alone / PROMPTS).read_bytes()
    expect(equal, "two Ray workers on shares of the cards differ from one process")


def same_bits(visit: Visit) -> None:
    """The same training twice has the same bits, for all methods with backbone.deterministic."""
    clip = random_clip(visit.large, device=visit.device)
    settings = {False: "default", True: "deterministic"}
    for deterministic, name in settings.items():
        asked = BackboneConfig(device=visit.device, deterministic=deterministic)  # type: ignore[arg-type]
        differ, took = [], {}
        with ordered_sums(asked):
            for method in (*ORDERED, *UNORDERED):
                call = local_round(example(clip, method, 5, 8), 3, 2)
                began = clock()
                first = tensors_of(call())
                took[method] = round(clock() - began, 3)
                second = tensors_of(call())
                if any(not torch.equal(t, second[n]) for n, t in first.items()):
                    differ.append(method)
        visit.facts[name] = {"differ": differ, "seconds": took}
        promised = differ if deterministic else [m for m in differ if m in ORDERED]
        expect(not promised, f"{name}: not the same bits: {promised}")


def waits(visit: Visit) -> None:
    """No local step waits for the device."""
    visit.only_cuda()
    clip = random_clip(visit.large, device=visit.device)
    for method in ("promptfl", "fedrsclip", "vpt"):
        counts = []
        for steps in (1, 3):
            call = local_round(example(clip, method, batch=8), 2, steps)
            call()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    call()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            found = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
            counts.append(len(found))
        visit.facts[method] = {"per_step": (counts[1] - counts[0]) / 2, "last": found[-3:]}
    over = [m for m, found in visit.facts.items() if found["per_step"] > 0]
    expect(not over, f"steps wait for the device: {over}")


class _Waits(PromptFL):
    """PromptFL with a number that the host reads in every step, which no graph can repeat."""

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        terms = super().loss_terms(shared, private, encoded, batch)
        return {"ce": terms["ce"] * float(terms["ce"].detach().isfinite().any().item())}


def cuda_graphs(visit: Visit) -> None:
    """Replayed steps have the bits of plain ones; a step that waits is taken plainly."""
    visit.only_cuda()
    clip = random_clip(visit.large, device=visit.device)
    for method in ("promptfl", "fedrsclip", "kgcoop"):
        for clients in (1, 16):
            workspace = example(clip, method)
            graphs = StepGraphs(workspace.method, CudaRecorder(clip.device))
            times = {}
            for name, recordings in (("plain", None), ("replayed", graphs)):
                long, short = (
                    seconds(local_round(workspace, clients, steps, recordings)) for steps in (6, 2)
                )
                times[f"{name}_ms"] = round(1e3 * (long - short) / 4, 3)
            plain = tensors_of(local_round(workspace, clients, 3)())
            replayed = tensors_of(local_round(workspace, clients, 3, graphs)())
            differ = [n for n, t in plain.items() if not torch.equal(t, replayed[n])]
            visit.facts[f"{method} K={clients}"] = times | {"refused": graphs.refused}
            expect(graphs.refused is None, f"{method} was not recorded: {graphs.refused}")
            expect(not differ, f"{method}: replayed steps have other bits: {differ[:3]}")
    workspace = example(clip, "promptfl")
    workspace.method = _Waits(workspace.config.method, clip, workspace.task)
    graphs = StepGraphs(workspace.method, CudaRecorder(clip.device))
    found = tensors_of(local_round(workspace, 2, 3, graphs)())
    visit.facts["a step that waits"] = graphs.refused
    expect(graphs.refused is not None, "a step that waits was recorded")
    expected = tensors_of(local_round(workspace, 2, 3)())
    equal = all(torch.equal(t, found[n]) for n, t in expected.items())
    expect(equal, "after a recording that failed, plain steps have other bits")


def memory(visit: Visit) -> None:
    """A step of several clients takes no more than the estimate that sizes blocks."""
    visit.only_cuda()
    clip, clients = random_clip(visit.large, device=visit.device), 4
    for method in ESTIMATED:
        workspace = example(clip, method)
        estimate = step_memory(workspace)
        assert estimate is not None
        call = local_round(workspace, clients, 1)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        peak = torch.cuda.max_memory_allocated() - before
        expected = clients * estimate.training
        visit.facts[method] = {"peak_mb": peak / 1e6, "estimate_over_peak": expected / peak}
    low = [m for m, found in visit.facts.items() if found["estimate_over_peak"] < 1]
    expect(not low, f"the estimate is too low: {low}")


def out_of_memory(visit: Visit) -> None:
    """A block that does not fit on the card loses no client."""
    visit.only_cuda()
    config = config_of(
        visit.device,
        "vpt",
        partition={"clients": 8, "alpha": 10.0},
        simulation={"clients_per_block": 8},
    )
    workspace = open_workspace(config, resources=visit.opened[visit.device])
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    federation.train_round(1)
    need = torch.cuda.max_memory_allocated() - before
    total = torch.cuda.get_device_properties(0).total_memory
    for share in (0.9, 0.5, 0.3):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((before + share * need) / total)
        try:
            line = federation.train_round(2)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        visit.facts[f"{share:.0%}"] = line["clients"]
        expect(line["clients"]["rejected"] == 0, f"clients were lost at {share:.0%} of the need")


def speed(visit: Visit) -> None:
    """Milliseconds of a local step by method, precision, classes C and clients K."""
    cases = [(c, k) for c in (10, 100) for k in (1, 16)] if visit.cuda else [(5, 2)]
    for precision in PRECISIONS if visit.cuda else PRECISIONS[:1]:
        clip = random_clip(visit.large, device=visit.device, precision=precision)
        for method in ("promptfl", "fedrsclip"):
            for classes, clients in cases:
                workspace = example(clip, method, classes)
                # Longer minus shorter: what a round costs besides its steps is left out.
                long, short = (seconds(local_round(workspace, clients, n)) for n in (6, 2))
                key = f"{method} {precision} C={classes} K={clients}"
                visit.facts[key] = {"step_ms": round(1e3 * (long - short) / 4, 3)}


def encoding(visit: Visit) -> None:
    """Images per second of the image tower, the copy from the host included."""
    for precision in PRECISIONS if visit.cuda else PRECISIONS[:1]:
        clip = random_clip(visit.large, device=visit.device, precision=precision)
        for batch in (64, 256) if visit.cuda else (8,):
            images = random_images(clip, batch, seed=0)
            took = seconds(lambda: clip.encode_images(images))  # noqa: B023  # called at once
            visit.facts[f"{precision}, batches of {batch}"] = round(batch / took, 1)


def methods(visit: Visit) -> None:
    """Every method's two rounds and scores are the CPU's; stops when the time is up."""
    names = list(all_methods()) if visit.cuda else ["promptfl", "fedrsclip", "plot", "vpt"]
    failed, gaps = {}, {}
    for number, name in enumerate(names):
        if time.monotonic() > visit.ends:
            visit.facts["not_reached"] = names[number:]
            break
        try:
            ours, accuracy = _federated(visit, visit.device, name)
            theirs, expected = _federated(visit, "cpu", name) if visit.cuda else (ours, accuracy)
            moving = {n: t for n, t in theirs.items() if float(t.abs().max()) > 1e-6}
            gaps[name] = max_rel_diff(ours, moving)
            expect(gaps[name] < 0.02, f"tensors differ by {gaps[name]:.1e}")
            expect(abs(accuracy - expected) < 0.06, f"accuracy {accuracy:.3f}, not {expected:.3f}")
        except Exception as error:  # all methods are wanted, not the first that fails
            failed[name] = _reason(error)
    visit.facts.update(gaps=gaps, failed=failed)
    expect(not failed, f"{len(failed)} of {len(gaps) + len(failed)} methods failed")


def _federated(visit: Visit, device: str, method: str) -> tuple[dict[str, Tensor], float]:
    """Tensors after two rounds, and the mean accuracy of personal models."""
    workspace = open_workspace(config_of(device, method), resources=visit.opened[device])
    grid = InlineGrid(workspace)
    federation = Federation(workspace, grid)
    federation.join()
    for server_round in (1, 2) if workspace.method.trainable else ():
        line = federation.train_round(server_round)
        expect(line["clients"]["rejected"] == 0, f"replies were rejected: {line['clients']}")
    scores = federation.evaluate(2)
    tensors = {f"shared/{n}": t for n, t in federation.shared.items()}
    for k in range(workspace.num_clients):
        tensors |= {f"{k}/{n}": t for n, t in (grid.private.get(k) or {}).items()}
    accuracy = scores["personal"]["accuracy"]
    return tensors, sum(accuracy) / len(accuracy)


CHECKS: tuple[Callable[[Visit], None], ...] = (
    environment, towers, whole_run, same_bits, waits, memory, out_of_memory, speed, cuda_graphs,
    encoding, methods,
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the checks.

    Returns:
        0, or 1 if a check has failed.
    """
    names = [check.__name__ for check in CHECKS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="CHECK")
    parser.add_argument("--out", type=Path, help="folder of results.json; default: a new one")
    parser.add_argument("--minutes", type=float, default=4.0, help="no method starts after them")
    options = parser.parse_args(arguments)
    out = options.out or Path(tempfile.mkdtemp(prefix="gpu_check-"))
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("FEDPROMPT_CACHE", str(out / "cache"))
    logging.getLogger("fedprompt").setLevel(logging.ERROR)
    visit = Visit(pick_device(options.device), out, options.minutes)
    results: dict[str, Any] = {}
    for check in CHECKS:
        if check.__name__ in options.only:
            results[check.__name__] = _result(visit, check)
            text = json.dumps(results, indent=1, default=str) + "\n"
            (out / "results.json").write_text(text, encoding="utf-8")
    failed = [name for name, found in results.items() if found["state"] == "FAIL"]
    print(f"{len(results)} checks, failed: {', '.join(failed) or 'none'}; {out / 'results.json'}")
    return 1 if failed else 0


def _result(visit: Visit, check: Callable[[Visit], None]) -> dict[str, Any]:
    """Run one check, and print and return what it found."""
    visit.facts, state, why, began = {}, "ok", "", time.monotonic()
    try:
        check(visit)
    except Skip as reason:
        state, why = "skip", str(reason)
    except Exception as error:
        state, why = "FAIL", _reason(error)
    took = time.monotonic() - began
    gc.collect()
    if visit.cuda:
        torch.cuda.empty_cache()
    print(f"{state:4s} {check.__name__:14s} {took:6.1f} s  {why}", flush=True)
    for key, value in visit.facts.items():
        print(f"       {key}: {value}", flush=True)
    return {"state": state, "why": why, "seconds": round(took, 1), "facts": visit.facts}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


if __name__ == "__main__":
    sys.exit(main())
