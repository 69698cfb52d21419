#!/usr/bin/env python
"""What octaves, and the two kinds of convolution, bring beyond the training sizes: one budget, many networks.

    python experiments/experiment.py train                      # every run, one after another; finished ones are kept
    python experiments/experiment.py train dual-0 spatial-0     # only these, e.g. side by side on two cores
    python experiments/experiment.py evaluate                   # samples and metrics, by examples/evaluate_dfu.py
    python experiments/experiment.py report                     # tables, curves and pictures in experiments/results
    python experiments/experiment.py picture DFU UNET           # of two saved pipelines: samples.png in --output_dir
    python experiments/experiment.py train dual-0 octaves-0 --data_dir outputs/data/emoji --extractor efficientnet

Runs (name-seed), with the same images, noise and number of images seen:
    dual       DFU, several resolutions         spatial    the same without spectral paths (the paper's UNet)
    dual-N     DFU, only N px                   spectral   the same without 3x3 convolutions (the paper's FNO-UNet)
    upsampled  `dual` fine-tuned with images    wide       `spatial` with as many parameters as `dual`
               enlarged to 5/3 of its largest   compact    `dual` with factorised spectral weights, spectral_rank 0.5
               size (section 4 of arXiv 2401.06144)
    tall       `dual` with about as many       mirror     `dual` with waves that are reflected at the edges, of the
               modes in the proportions of the            same frequencies (3.5 times the spectral parameters)
               paper's: twice as high a band down
               as across                       octaves    a trunk and a refiner, trained on the same images for
                                               the time of `dual`: two runs, put into one pipeline
Rows beside these: samples of the largest training size, enlarged, and `dual` in the cascade. The images are procedural
portraits, or --data_dir/train and /validation. --budget gpu trains to 64 px.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from PIL import Image

from dfu_diffusers import DFUModel, DFUPipeline, DFURefiner
from dfu_diffusers.evaluation.sheets import contact_sheet
from dfu_diffusers.evaluation.tables import markdown, write_csv

ROOT = Path(__file__).resolve().parent.parent
FACTORS = {1: "1x", 4 / 3: "1.33x", 5 / 3: "1.66x", 2: "2x", 3: "3x", 4: "4x", 8: "8x"}
# Which runs are sampled at which factors; "far" has twice the width, too.
NEAR, FAR = 2, 4
RUNS = {
    "far": ["dual-0", "spatial-0", "octaves-0", "octaves-1"],
    "farthest": ["dual-0", "octaves-0", "octaves-1"],
    "cascade": ["dual-0"],
}
PARTS = ("near", *RUNS)
SHOWN = 4  # largest factor in the picture
COLUMNS = {
    "fd": "fidelity: Frechet distance",
    "kid": "fidelity: kernel distance",
    "coherence": "coherence: Frechet distance after averaging down",
    "spectrum": "distance of spectra",
    "power": "power, log10 of drawn to true, in the worst octave",
}
# The Frechet distance needs more images than its features have dimensions, which other extractors are too wide for.
METRICS = {"portrait": ["fd", "coherence", "spectrum", "power"], "other": ["kid", "spectrum", "power"]}
CONFIG = {
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "fourier_modes": [[5, 6], [4, 5], [2, 3]],
    "attention_levels": [2],
    "dropout": 0.0,
}
# Of "octaves": the trunk draws half of the largest size, the refiner adds the rest.
TRUNK = {
    **CONFIG,
    "block_out_channels": [32, 48, 64],
    "fourier_modes": [None] * 3,
    "conv_type": "spatial",
    "attention_levels": [1, 2],
}
REFINER = {"_class_name": "DFURefiner", "hidden_channels": 64, "detail_std": None}


@dataclass
class Budget:
    resolutions: tuple[int, ...]
    steps: int
    batch_size: int
    fine_tuning_steps: int
    images: int  # sampled at each size
    octave_steps: tuple[int, int]  # of trunk and refiner: they take together the core time of `dual`

    @property
    def largest(self) -> int:
        return max(self.resolutions)

    def sizes(self, part: str | None = None) -> dict[str, str]:
        """Sizes of a part of the evaluation, or all, and how they are related to the largest in training."""
        sizes = {"near": {}, "far": {f"{self.largest}x{2 * self.largest}": "1:2"}, "farthest": {}}
        for factor, name in FACTORS.items():
            within = "near" if factor <= NEAR else "far" if factor <= FAR else "farthest"
            sizes[within][f"{round(factor * self.largest)}"] = name
        everything = sizes["near"] | sizes["far"] | sizes["farthest"]
        beyond = dict(list(everything.items())[1:])
        return {None: everything, "cascade": beyond, **sizes}[part]


BUDGETS = {
    "cpu": Budget((16, 24, 32), 1500, 32, 200, 100, (2200, 1500)),
    "gpu": Budget((32, 48, 64), 6000, 128, 600, 2000, (9000, 6000)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Training


def runs(budget: Budget) -> list[str]:
    """Names of all runs, those of the headline rows (two seeds) first."""
    headline = [f"{kind}-{seed}" for seed in (0, 1) for kind in ("dual", "spatial", "spectral", "octaves")]
    others = [
        "upsampled-0",
        *(f"dual-{n}-0" for n in reversed(budget.resolutions)),
        "wide-0",
        "compact-0",
        "compact-1",
        "tall-0",
        "mirror-0",
    ]
    return headline + others


def model_config(kind: str, budget: Budget) -> dict:
    conv_type = {"spatial": "spatial", "wide": "spatial", "spectral": "spectral"}.get(kind, "dual")
    config = {**CONFIG, "sample_size": budget.largest, "conv_type": conv_type}
    changes = {
        "compact": {"spectral_rank": 0.5},
        "tall": {"fourier_modes": [[7, 4], [6, 3], [3, 2]]},
        "mirror": {
            "spectral_boundary": "mirror",
            "fourier_modes": [[2 * rows, 2 * columns - 1] for rows, columns in CONFIG["fourier_modes"]],
        },
    }
    config |= changes.get(kind, {})
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


def options_of(run: str, budget: Budget, output: Path) -> dict:
    """Options of the trainer for a run, or for one of the two parts of "octaves", octaves-SEED/trunk or /refiner.
    Writes the configuration of its model beside what it trains."""
    run, _, part = run.partition("/")
    kind, _, seed = run.rpartition("-")
    options = {"resolutions": budget.resolutions, "batch_size": budget.batch_size, "max_train_steps": budget.steps,
               "learning_rate": 1e-3, "seed": seed}  # fmt: skip
    if kind == "upsampled":
        return options | {
            "init_from": output / f"dual-{seed}",
            "upsample_resolutions": [round(5 / 3 * budget.largest)],
            "upsample_weight": 0.3,
            "max_train_steps": budget.fine_tuning_steps,
            "learning_rate": 2e-4,
        }
    config = {"trunk": TRUNK, "refiner": REFINER}.get(part) or model_config(kind, budget)
    model = output / run / part / "model.json"
    model.parent.mkdir(parents=True, exist_ok=True)
    model.write_text(json.dumps(config))
    options["model_config"] = model
    if kind.startswith("dual-"):
        options["resolutions"] = [kind.removeprefix("dual-")]
    if part == "trunk":
        options |= {"resolutions": [budget.largest // 2], "source_resolution": budget.largest, "p_mean": -1.7,
                    "p_std": 1.6, "max_train_steps": budget.octave_steps[0]}  # fmt: skip
    elif part == "refiner":
        sizes = [round(share * budget.largest) for share in (0.625, 0.8, 1)]
        options |= {"resolutions": sizes, "resolution_weights": [0.2, 0.2, 0.6],
                    "max_train_steps": budget.octave_steps[1]}  # fmt: skip
    return options


def training_command(run: str, budget: Budget, args: argparse.Namespace) -> list[str]:
    output = args.output_dir
    options = {"output_dir": output / run, **options_of(run, budget, output)}
    options |= {
        "mixed_precision": {"float32": "no", "bfloat16": "bf16"}[args.dtype],
        "report_images": options["max_train_steps"] * budget.batch_size,
        "report_to": "none",
        "checkpointing_steps": 250,
        "checkpoints_total_limit": 1,
    }
    if args.data_dir:
        options |= {"train_data_dir": args.data_dir / "train", "cache_dir": output / "cache"}
    if any((output / run).glob("checkpoint-*")):
        options["resume_from_checkpoint"] = "latest"
    return command("train_dfu.py", options)


def command(script: str, options: dict) -> list[str]:
    words = [sys.executable, str(ROOT / "examples" / script)]
    for name, value in options.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    return words


def execute(words: list[str]) -> None:
    if subprocess.run(words).returncode:  # the script has said why
        raise SystemExit("The experiment stopped: the same command goes on with it.")


def train(names: list[str], budget: Budget, args: argparse.Namespace) -> None:
    output = args.output_dir
    for run in names:
        if (output / run / "model_index.json").exists():
            print(f"{run} is finished.")
        elif run.startswith("octaves-") and "/" not in run:
            train([f"{run}/trunk", f"{run}/refiner"], budget, args)
            refiner = DFURefiner.from_pretrained(output / run / "refiner" / "refiner")
            DFUPipeline.from_pretrained(output / run / "trunk", refiner=refiner).save_pretrained(output / run)
        else:
            print(f"Training {run}.", flush=True)
            execute(training_command(run, budget, args))
            if not (output / run / "model_index.json").exists():
                raise SystemExit(f"{run} was stopped before its end: the same command goes on with it.")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(names: list[str], budget: Budget, args: argparse.Namespace) -> None:
    """Samples and metrics of the finished runs among `names`; what was sampled before is kept."""
    output = args.output_dir
    finished = [run for run in names if (output / run / "model_index.json").exists()]
    if not finished:
        raise SystemExit(f"None of {', '.join(names)} is finished in {output}: run `train` first.")
    for part in args.parts:
        chosen = [run for run in finished if run in RUNS.get(part, finished)]
        if not chosen:
            continue
        options = {
            "model": [output / run for run in chosen],
            "sizes": list(budget.sizes(part)),
            "train_size": budget.largest,
            "num_images": budget.images,
            "extractor": args.extractor,
            "metrics": METRICS.get(args.extractor, METRICS["other"]),
            "dtype": args.dtype,
            "batch_size": 20,
            "output_dir": output / part,
        }
        if part == "cascade":
            options["strategy"] = part
        if args.data_dir:
            options["reference_dir"] = args.data_dir / "validation"
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(args.processes)]
        execute(launch + command("evaluate_dfu.py", options)[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Report


def read_results(output: Path) -> dict[str, dict]:
    """What the evaluations wrote, by part."""
    files = {part: output / part / "results.json" for part in PARTS}
    found = {part: json.loads(file.read_text(encoding="utf-8")) for part, file in files.items() if file.exists()}
    if "near" not in found:
        raise SystemExit(f"There are no results in {output}: run `train` and `evaluate` first.")
    return found


def rows_of(results: dict[str, dict]) -> list[dict]:
    """One dict for each run, way of drawing and size: run, kind, method, size, factor and the figures."""
    rows = []
    for part, row in ((part, row) for part, result in results.items() for row in result["rows"]):
        if part == "cascade" and row["method"] != "model":
            continue  # as in the other parts
        run = row["name"].split(", ")[0]
        kind = run if row["method"] == "real" else run.rsplit("-", 1)[0]
        height, width = row["size"].split("x")
        entry = {"run": run, "kind": f"{kind}, cascade" if part == "cascade" else kind, "method": row["method"]}
        entry |= {"size": height if height == width else row["size"], "factor": row["factor"]}
        rows.append(entry | {"seconds": row["seconds_per_image"], **row["figures"]})
    return rows


def by_kind(rows: list[dict], column: str) -> dict[str, dict[str, list[float]]]:
    """Values of a column, one for each seed, by name of the row and size. `dual, lanczos` is upsampling."""
    upsampled = ("dual", "octaves")
    values = defaultdict(lambda: defaultdict(list))
    for row in rows:
        name = row["kind"] if row["method"] in ("model", "real") else f"{row['kind']}, {row['method']}"
        if column in row and (row["method"] in ("model", "real") or row["kind"] in upsampled):
            values[name][row["size"]].append(row[column])
    return values


def table(rows: list[dict], column: str, heading: str, budget: Budget) -> str:
    values, sizes = by_kind(rows, column), budget.sizes()
    sizes = {size: name for size, name in sizes.items() if any(size in row for row in values.values())}
    return markdown(
        [
            {heading: name} | {f"{size} px, {factor}": numbers(row.get(size, [])) for size, factor in sizes.items()}
            for name, row in values.items()
        ]
    )


def plot(rows: list[dict], path: Path, largest: int) -> None:
    """Fidelity and coherence against size; a line for each network, its mean, and a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = [column for column in ("fd", "kid", "coherence") if by_kind(rows, column)]
    figure, axes = plt.subplots(1, len(columns), figsize=(5 * len(columns), 4), squeeze=False)
    shades = [*plt.colormaps["tab20"].colors[::2], *plt.colormaps["tab20"].colors[1::2]]  # the strong ones first
    colors = dict(zip(by_kind(rows, columns[0]), shades)) | {"real": "k"}
    for axis, column in zip(axes.flat, columns):
        for name, values in by_kind(rows, column).items():
            sizes, color = sorted((size for size in values if size.isdecimal()), key=int), colors[name]
            axis.plot(list(map(int, sizes)), [mean(values[size]) for size in sizes], color=color, label=name)
            dots = [(int(size), value) for size in sizes for value in values[size]]
            axis.plot(*zip(*dots), color=color, marker=".", linestyle="none")
        axis.axvline(largest, color="0.8", zorder=0)
        axis.set(title=COLUMNS[column], xlabel="size, px (grey: largest in training)", yscale="log")
    figure.tight_layout()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=5)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def picture(dual: DFUPipeline, spatial: DFUPipeline, seeds: int = 3) -> Image.Image:
    """The same seeds from 1x to 4x, a line each: sampled by `dual`, as it is and by the cascade; its sample at 1x
    enlarged bilinearly; and sampled by `spatial`."""
    side = dual.unet.config.sample_size
    factors = {factor: name for factor, name in FACTORS.items() if factor <= SHOWN}
    sizes = [round(factor * side) for factor in factors]
    smallest = samples(dual, side, seeds)
    rows = {f"seed {seed}, {name}": [] for seed in range(seeds) for name in ("DFU", "cascade", "enlarged", "UNet")}
    for size in sizes:
        drawn = {"DFU": samples(dual, size, seeds), "cascade": samples(dual, size, seeds, strategy="cascade")}
        drawn["enlarged"] = [image.resize((size, size), Image.Resampling.BILINEAR) for image in smallest]
        drawn["UNet"] = samples(spatial, size, seeds)
        for name, images in drawn.items():
            for seed, image in enumerate(images):
                rows[f"seed {seed}, {name}"].append(image)
    return contact_sheet(rows, columns=[f"{size} px, {factor}" for size, factor in zip(sizes, factors.values())])


def samples(pipe: DFUPipeline, size: int, seeds: int, **options) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    return pipe(batch_size=seeds, height=size, width=size, generator=generators, **options).images


def load(folder: Path) -> DFUPipeline:
    return DFUPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)


def claims(rows: list[dict], budget: Budget) -> str:
    """The claims of the paper and of this package, each with the figures that decide it."""
    compared = [
        ("octaves beat sampling directly", "octaves", "dual"),
        ("octaves beat the cascade", "octaves", "dual, cascade"),
        ("octaves beat the UNet", "octaves", "spatial"),
        ("octaves beat the FNO-UNet", "octaves", "spectral"),
        ("octaves beat enlarging", "octaves", "octaves, lanczos"),
        ("DFU beats the UNet", "dual", "spatial"),
        ("DFU beats the FNO-UNet", "dual", "spectral"),
        ("DFU beats a UNet of as many parameters", "dual", "wide"),
        ("several training sizes beat the largest alone", "dual", f"dual-{budget.largest}"),
        ("fine-tuning with enlarged images helps", "upsampled", "dual"),
        ("factorised spectral weights are no worse", "compact", "dual"),
        ("modes alike on both axes are better", "dual", "tall"),
        ("reflected waves are better", "mirror", "dual"),
        ("sampling directly beats enlarging", "dual", "dual, lanczos"),
    ]
    lines = []
    for (claim, ours, theirs), column in itertools.product(compared, ("fd", "kid", "coherence")):
        values = by_kind(rows, column)
        found = [(size, values[ours][size], values[theirs][size]) for size in budget.sizes()]
        found = [(size, a, b) for size, a, b in found if a and b]
        if found:
            cells = "; ".join(f"{size} px {numbers(a)} against {numbers(b)}" for size, a, b in found)
            lines.append({"claim": claim, "measure": COLUMNS[column], "here": cells, "reproduced": verdict(found)})
    return markdown(lines)


def numbers(values: list[float]) -> str:
    return " / ".join(f"{value:.3g}" for value in values)


def verdict(found: list[tuple[str, list[float], list[float]]]) -> str:
    """ "yes" where every seed beats every seed of the other, "no" the other way round, "mixed" otherwise."""
    better = [max(ours) < min(theirs) for _, ours, theirs in found]
    worse = [min(ours) > max(theirs) for _, ours, theirs in found]
    return "yes" if all(better) else "no" if all(worse) else "mixed"


def report(budget: Budget, args: argparse.Namespace) -> None:
    """Writes experiment.md and so on, or experiment_NAME.md for the data of a folder of this name."""
    output, results = args.output_dir, args.results_dir
    found = read_results(output)
    rows, facts = rows_of(found), found["near"]
    results.mkdir(parents=True, exist_ok=True)
    name = f"experiment_{args.data_dir.resolve().name}" if args.data_dir else "experiment"
    write_csv(results / f"{name}.csv", rows)
    plot(rows, results / f"{name}_curves.png", budget.largest)
    picture(load(output / "dual-0"), load(output / "spatial-0")).save(results / f"{name}_samples.png")
    options = facts["options"]
    sizes, versions = ", ".join(map(str, budget.resolutions)), facts["versions"]
    data = f", --data_dir {args.data_dir} --extractor {args.extractor}" if args.data_dir else ""
    setting = (
        f"By `python experiments/experiment.py train`, `evaluate` and `report`{data}: trained at {sizes} px for "
        f"{budget.steps:,} steps of {budget.batch_size} (octaves: {budget.octave_steps[0]:,} of the trunk, "
        f"{budget.octave_steps[1]:,} of the refiner); {budget.images} images a size from seeds 0 to "
        f"{budget.images - 1}, {options['num_inference_steps']} Heun steps; {facts['device']}, {options['dtype']}, "
        f"torch {versions['torch']}, commit {facts['commit']}."
    )
    measured = {column: heading for column, heading in COLUMNS.items() if by_kind(rows, column)}
    parts = [setting, "", *(table(rows, column, heading, budget) for column, heading in measured.items())]
    text = "\n".join([*parts, claims(rows, budget)])
    (results / f"{name}.md").write_text(f"# Beyond the training sizes\n\n{text}", encoding="utf-8")
    print(text)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "evaluate", "report", "picture"])
    parser.add_argument("runs", nargs="*", help="names of runs (default: all), or two folders for `picture`")
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="in training and sampling")
    parser.add_argument("--data_dir", type=Path, help="with train/ and validation/, rather than portraits")
    parser.add_argument("--extractor", default="portrait", help="of features, as of evaluate_dfu.py")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the evaluation")
    parser.add_argument("--processes", type=int, default=1, help="that share an evaluation")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/experiment"))
    parser.add_argument("--results_dir", type=Path, default=ROOT / "experiments" / "results")
    args = parser.parse_args(argv)
    budget = BUDGETS[args.budget]
    if args.stage == "picture":
        if len(args.runs) != 2 or not all(Path(folder).is_dir() for folder in args.runs):
            parser.error(f"picture takes the folders of two pipelines, but got {' '.join(args.runs) or 'none'}")
        args.output_dir.mkdir(parents=True, exist_ok=True)
        picture(*map(load, args.runs), seeds=2).save(args.output_dir / "samples.png")
        return
    unknown = set(args.runs) - set(runs(budget))
    if unknown:
        parser.error(f"no such run: {', '.join(sorted(unknown))}; there are {', '.join(runs(budget))}")
    names = args.runs or runs(budget)
    if args.stage == "train":
        train(names, budget, args)
    elif args.stage == "evaluate":
        evaluate(names, budget, args)
    else:
        report(budget, args)


if __name__ == "__main__":
    main()
