#!/usr/bin/env python
"""What the two kinds of convolution bring beyond the training sizes: one recipe, one budget, many networks.

    python benchmarks/experiment.py train                      # every run, one after another; finished ones are kept
    python benchmarks/experiment.py train dual-0 spatial-0     # only these, e.g. side by side on two cores
    python benchmarks/experiment.py evaluate                   # samples and metrics, by examples/evaluate_dfu.py
    python benchmarks/experiment.py report                     # tables, curves and pictures in benchmarks/results

Runs (name-seed), all on procedural portraits, with the same images, noise and number of images seen:
    dual       DFU, several resolutions         spatial    the same without spectral paths (the paper's UNet)
    dual-N     DFU, only N px                   spectral   the same without 3x3 convolutions (the paper's FNO-UNet)
    upsampled  `dual` fine-tuned with images    wide       `spatial` with as many parameters as `dual`
               enlarged to 5/3 of its largest size (section 4 of arXiv 2401.06144)
Sampling at the largest training size and enlarging is a row beside each. --budget gpu trains to 64 px and tests to 256.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from dfu_diffusers import DFUModel

ROOT = Path(__file__).resolve().parent.parent
FACTORS = {1: "1x", 4 / 3: "1.33x", 5 / 3: "1.66x", 2: "2x", 3: "3x", 4: "4x"}
FAR = 2  # beyond this factor only the headline runs are sampled, and fewer images of them
CONFIG = {
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "fourier_modes": [[5, 6], [4, 5], [2, 3]],
    "attention_levels": [2],
    "dropout": 0.0,
}


@dataclass
class Budget:
    resolutions: tuple[int, ...]
    steps: int
    batch_size: int
    fine_tuning_steps: int
    images: int  # sampled at each size up to FAR times the largest
    far_images: int
    inference_steps: int = 18

    @property
    def largest(self) -> int:
        return max(self.resolutions)

    def sizes(self, far: bool) -> list[int]:
        return [round(factor * self.largest) for factor in FACTORS if (factor > FAR) == far]


BUDGETS = {
    "cpu": Budget((16, 24, 32), 1500, 32, 200, 100, 40),
    "gpu": Budget((32, 48, 64), 6000, 128, 600, 2000, 500),
}


# ---------------------------------------------------------------------------------------------------------------------
# Training


def runs(budget: Budget) -> list[str]:
    """Names of all runs, those of the headline rows (two seeds) first."""
    headline = [f"{kind}-{seed}" for seed in (0, 1) for kind in ("dual", "spatial", "spectral")]
    return headline + ["upsampled-0", *(f"dual-{n}-0" for n in reversed(budget.resolutions)), "wide-0"]


def model_config(kind: str, budget: Budget) -> dict:
    conv_type = {"spatial": "spatial", "wide": "spatial", "spectral": "spectral"}.get(kind, "dual")
    config = {**CONFIG, "sample_size": budget.largest, "conv_type": conv_type}
    return {**config, "block_out_channels": matching_channels(config)} if kind == "wide" else config


def matching_channels(spatial: dict) -> list[int]:
    """Channels, in the proportions of `spatial`, of the spatial network nearest to the dual one in parameters."""

    def parameters(**changes) -> int:
        with torch.device("meta"):
            return DFUModel(**{**spatial, **changes}).num_parameters()

    wanted = parameters(conv_type="dual")
    first, *others = spatial["block_out_channels"]
    widths = [[n, *(n * other // first for other in others)] for n in range(first, 8 * first, 4)]
    return min(widths, key=lambda channels: abs(parameters(block_out_channels=channels) - wanted))


def training_command(run: str, budget: Budget, output: Path, seed: int) -> list[str]:
    kind = run.rsplit("-", 1)[0]
    single = kind.startswith("dual-")
    options = {
        "output_dir": output / run,
        "resolutions": [kind.removeprefix("dual-")] if single else budget.resolutions,
        "batch_size": budget.batch_size,
        "max_train_steps": budget.steps,
        "learning_rate": 1e-3,
        "mixed_precision": "bf16",
        "report_images": budget.steps * budget.batch_size,
        "report_to": "none",
        "checkpointing_steps": 250,
        "checkpoints_total_limit": 1,
        "seed": seed,
    }
    if kind == "upsampled":
        options |= {
            "init_from": output / f"dual-{seed}",
            "upsample_resolutions": [round(5 / 3 * budget.largest)],
            "upsample_weight": 0.3,
            "max_train_steps": budget.fine_tuning_steps,
            "learning_rate": 2e-4,
        }
    else:
        config = output / run / "model.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(model_config(kind, budget)))
        options["model_config"] = config
    if any((output / run).glob("checkpoint-*")):
        options["resume_from_checkpoint"] = "latest"
    return command("train_dfu.py", options)


def command(script: str, options: dict) -> list[str]:
    words = [sys.executable, str(ROOT / "examples" / script)]
    for name, value in options.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    return words


def train(names: list[str], budget: Budget, output: Path) -> None:
    for run in names:
        if (output / run / "model_index.json").exists():
            print(f"{run} is finished.")
            continue
        print(f"Training {run}.", flush=True)
        subprocess.run(training_command(run, budget, output, int(run.rsplit("-", 1)[1])), check=True)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "evaluate", "report"])
    parser.add_argument("runs", nargs="*", help="names of runs (default: all)")
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/experiment"))
    args = parser.parse_args(argv)
    budget = BUDGETS[args.budget]
    unknown = set(args.runs) - set(runs(budget))
    if unknown:
        parser.error(f"no such run: {', '.join(sorted(unknown))}; there are {', '.join(runs(budget))}")
    names = args.runs or runs(budget)
    train(names, budget, args.output_dir)


if __name__ == "__main__":
    main()
