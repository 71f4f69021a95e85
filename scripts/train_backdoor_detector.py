"""Train the detector of strategy `sabre_fl` on an experiment's server test images.

    python scripts/train_backdoor_detector.py attack_backdoor --out detector.json \\
        "data.domains=[countryside,boreal]" data.images_per_class=10

The experiment should have other images than the federation that the detector is for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fedprompt.experiment.backdoor_detector import train_detector
from fedprompt.experiment.compose import compose
from fedprompt.experiment.workspaces import open_workspace


def main() -> None:
    """Train, write the file and print how well the detector separates new images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("experiment")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--steps", type=int, default=12)
    asked = parser.parse_intermixed_args()
    workspace = open_workspace(compose(asked.experiment, asked.overrides))
    found = train_detector(workspace, targets=asked.targets, images=asked.images, steps=asked.steps)
    content = {
        "weight": [round(value, 6) for value in found.weight_D.tolist()],
        "bias": round(found.bias, 6),
    }
    asked.out.write_text(json.dumps(content) + "\n", encoding="utf-8")
    print(f"{asked.out}: AUC {found.auc:.3f} on other images and triggers")


if __name__ == "__main__":
    main()
