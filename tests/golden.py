"""Golden outputs: freeze the results of a set of runs, and compare another checkout with them.

A refactoring must not change a single bit of a result. Last bits differ between processors and
versions of PyTorch, so nothing is committed: the outputs are frozen with the old code and compared
with the new code, on one machine and in one environment:

    python tests/golden.py freeze FOLDER --code OLD_CHECKOUT
    python tests/golden.py compare FOLDER

`--only NAME` limits both to some runs, `--every-method` adds one short run of every method. The
comparison ends with exit status 1 when `metrics.jsonl` or the prompts of any run differ.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPARED = ("metrics.jsonl", "prompts.safetensors")
RENAMED = {
    "simulation.clients_per_block": "grid.cohort_size",
    "simulation.": "grid.",
}
"""Config keys as they were called before the packages were rebuilt."""

SHORT = ("federation.rounds=3", "data.images_per_class=8")
RUNS: dict[str, list[str]] = {
    "label_skew": ["run", "quickstart"],
    "ray": ["run", "label_skew", "simulation.kind=ray", "simulation.workers=2", *SHORT],
    "secure": ["run", "secure_aggregation", *SHORT],
    "secure_noise": [
        "run", "secure_aggregation", "privacy.noise=0.5", "privacy.clip=0.1",
        "privacy.noise_seed=7", *SHORT,
    ],
    "deploy": ["deploy", "local", "label_skew", "partition.clients=3", *SHORT],
    "patches": ["run", "label_skew", "method=fedotp", *SHORT],
    "local_patches": ["run", "label_skew", "method=plot", *SHORT],
    "pixels": ["run", "label_skew", "method=fedrsclip_visual", *SHORT],
    "wrapper": ["run", "label_skew", "method=ditto", *SHORT],
    "wrapper_control": ["run", "label_skew", "method=scaffold", *SHORT],
    "attack": ["run", "attack_sign_flip", "strategy=krum", *SHORT],
    "blocks": ["run", "label_skew", "simulation.clients_per_block=3", *SHORT],
}  # fmt: skip


def every_method() -> dict[str, list[str]]:
    """One short run of every method with its own strategy."""
    names = sorted(path.stem for path in (ROOT / "configs" / "method").glob("*.yaml"))
    small = ["federation.rounds=2", "data.images_per_class=8", "partition.clients=4"]
    return {
        f"method-{name}": ["run", "all_methods", f"method={name}", "evaluation.every=1", *small]
        for name in names
    }


def main() -> int:
    """Freeze or compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["freeze", "compare"])
    parser.add_argument("folder", type=Path, help="where the frozen outputs lie")
    parser.add_argument("--code", type=Path, default=ROOT, help="the checkout that runs")
    parser.add_argument("--only", action="append", help="a run's name; repeatable")
    parser.add_argument("--every-method", action="store_true", help="also one run per method")
    options = parser.parse_args()
    runs = RUNS | (every_method() if options.every_method else {})
    names = options.only or list(runs)
    different = []
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            out = _run(options.code.resolve(), runs[name], Path(scratch))
            frozen = options.folder / name
            if options.action == "freeze":
                frozen.mkdir(parents=True, exist_ok=True)
                for file in COMPARED:
                    shutil.copy(out / file, frozen / file)
                print(f"{name}: frozen", flush=True)
            else:
                faults = [
                    f for f in COMPARED if _content(name, out / f) != _content(name, frozen / f)
                ]
                different += [name] if faults else []
                print(
                    f"{name}: {'DIFFERS in ' + ', '.join(faults) if faults else 'equal'}",
                    flush=True,
                )
    print(json.dumps({"compared" if options.action == "compare" else "frozen": len(names),
                      "different": different}))  # fmt: skip
    return 1 if different else 0


def _content(name: str, path: Path) -> bytes:
    """What is compared: the bytes; of a deployment's metrics all but the byte counts.

    Flower draws the ids of real nodes at random, and a larger id takes more bytes in a message.
    """
    content = path.read_bytes()
    if name == "deploy" and path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        return json.dumps(
            [{k: v for k, v in line.items() if not k.startswith("bytes_")} for line in lines]
        ).encode()
    return content


def _run(code: Path, command: list[str], scratch: Path) -> Path:
    """Run one command with the code of a checkout; returns the run folder."""
    out = scratch / "run"
    if (code / "fedprompt" / "grid.py").is_file():  # the layout before the rebuild
        for new, old in RENAMED.items():
            command = [part.replace(new, old) if "=" in part else part for part in command]
    environment = {
        **os.environ,
        "PYTHONPATH": str(code),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "FEDPROMPT_STATE": str(scratch / "state"),
    }
    start = [
        sys.executable,
        "-m",
        "fedprompt",
        *command,
        f"output.dir={out}",
        "output.report=false",
    ]
    result = subprocess.run(
        start, cwd=scratch, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(start)} ended with {result.returncode}:\n{result.stderr}")
    return out


if __name__ == "__main__":
    sys.exit(main())
