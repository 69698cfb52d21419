#!/usr/bin/env python
"""Does bfloat16 change what training does? The same steps in float32 and under bfloat16 autocast.

    python experiments/compare_precisions.py [--steps 500] [--output_dir outputs/precisions] [options of train_dfu.py]

Both runs see the same images, noise and initial weights; finished ones are kept. Prints, for a tenth of the steps at a
time, both mean losses and the mean of their difference with its standard error, and writes results.md and losses.png.
"""

import argparse
import csv
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from dfu_diffusers.evaluation.tables import markdown, setting

ROOT = Path(__file__).resolve().parent.parent

PRECISIONS = {"float32": "no", "bfloat16": "bf16"}


def losses(folder: Path, precision: str, steps: int, options: list[str]) -> tuple[list[float], list[float]]:
    """Loss and seconds of every step of a run, which is trained if it is not there."""
    if not (folder / "model_index.json").exists():
        command = [sys.executable, str(ROOT / "examples" / "train_dfu.py"), "--output_dir", str(folder)]
        command += ["--max_train_steps", str(steps), "--mixed_precision", precision, "--report_to", "none"]
        subprocess.run([*command, *options], check=True)
    with open(folder / "loss.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if len(rows) != steps:
        raise SystemExit(f"{folder} holds a run of {len(rows)} steps: remove it, or take another --output_dir.")
    stamps = [float(row["seconds"]) for row in rows]
    return [float(row["loss"]) for row in rows], [b - a for a, b in zip(stamps, stamps[1:])]


def table(first: list[float], second: list[float], parts: int = 10) -> list[dict]:
    rows, names = [], list(PRECISIONS)
    length = max(1, len(first) // parts)
    for start in range(0, len(first), length):
        a, b = first[start : start + length], second[start : start + length]
        differences = [y - x for x, y in zip(a, b)]
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
        row = {"steps": f"{start + 1} to {start + len(a)}", names[0]: statistics.mean(a), names[1]: statistics.mean(b)}
        rows.append(row | {"difference": statistics.mean(differences), "standard error": error})
    return rows


def plot(first: list[float], second: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for values, name in zip((first, second), PRECISIONS):
        axis.plot(range(1, len(values) + 1), values, label=name, linewidth=0.8)
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/precisions"))
    args, options = parser.parse_known_args(argv)  # the others go to train_dfu.py
    runs = {n: losses(args.output_dir / n, precision, args.steps, options) for n, precision in PRECISIONS.items()}
    (first, seconds), (second, others) = runs.values()
    rows = table(first, second)
    speed = statistics.median(seconds) / statistics.median(others)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = ", ".join(f"{name} {value}" for name, value in setting(device).items())
    text = f"`python experiments/compare_precisions.py --steps {args.steps}`; {where}. A step (median) takes "
    text += f"{speed:.2f} times as long in float32, the runs one after the other.\n\n" + markdown(rows)
    (args.output_dir / "results.md").write_text(text, encoding="utf-8")
    plot(first, second, args.output_dir / "losses.png")
    print(text)
    return rows


if __name__ == "__main__":
    main()
