#!/usr/bin/env python
"""Write a DFU model, or a refiner, as one ONNX file for every batch size, height and width, and compare it with torch.

    python examples/export_onnx.py --output outputs/dfu.onnx --sizes 32 64x48 33x57
    python examples/export_onnx.py --component refiner --output outputs/refiner.onnx

The file takes `sample` (batch, channels, height, width), scaled by the scheduler as `forward` wants it, `timestep`
(batch,) and, for a class-conditional model, `class_labels` (batch,); of a refiner also `coarse`, shaped as `sample`,
and `coarse_noise` (batch,). Its `output` is shaped as `sample`. Sizes from 1 pixel up work.
Needs `pip install -e ".[onnx]"`.
"""

import argparse
from pathlib import Path

import onnxruntime
import torch

from dfu_diffusers import DFUModel, DFURefiner
from dfu_diffusers.command_line import count, resolution

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "dfu-portraits"
TOLERANCE = 1e-4
COMPONENTS = {"unet": DFUModel, "refiner": DFURefiner}
Model = DFUModel | DFURefiner


def example_inputs(model: Model, batch: int, height: int, width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(batch, model.config.in_channels, height, width, generator=generator),
        "timestep": torch.linspace(-1.5, 1, batch),
    }
    if isinstance(model, DFURefiner):
        inputs["coarse"] = torch.randn(inputs["sample"].shape, generator=generator)
        inputs["coarse_noise"] = torch.full((batch,), 0.01)
    elif model.config.num_class_embeds:
        inputs["class_labels"] = torch.arange(batch) % model.config.num_class_embeds
    return inputs


def dynamic_shapes(inputs: dict, batch, height, width) -> tuple:
    return tuple({0: batch, 2: height, 3: width} if tensor.ndim == 4 else {0: batch} for tensor in inputs.values())


def export(model: Model) -> torch.export.ExportedProgram:
    """The model as a graph for any batch size, and any height and width whose coarsest grid has two cells or more.

    `torch.export` takes a dimension of one cell for a constant, hence this bound; an ONNX file made of the graph does
    not know it. Guards are left to run time since they compare sizes of neighbouring levels, which the exporter cannot
    prove to hold at all sizes.
    """
    levels = 2 if isinstance(model, DFURefiner) else len(model.config.block_out_channels)
    smallest = 2 ** (levels - 1) + 1
    inputs = example_inputs(model, 2, 4 * smallest + 2, 4 * smallest - 1)
    batch, height, width = (
        torch.export.Dim(name, min=least) for name, least in (("batch", 1), ("height", smallest), ("width", smallest))
    )
    return torch.export.export(
        model.eval(),
        tuple(inputs.values()),
        dynamic_shapes=dynamic_shapes(inputs, batch, height, width),
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def write_onnx(model: Model, path: Path) -> None:
    program, inputs = export(model), example_inputs(model, 1, 1, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        program,
        input_names=list(inputs),
        output_names=["output"],
        dynamic_shapes=dynamic_shapes(inputs, "batch", "height", "width"),
        verbose=False,
    ).save(path)


@torch.no_grad()
def largest_difference(model: Model, session: onnxruntime.InferenceSession, batch: int, height: int, width: int):
    inputs = example_inputs(model, batch, height, width)
    (output,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return (torch.from_numpy(output) - model(**inputs).sample).abs().max().item()


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(CHECKPOINT), help="folder or Hub id of a saved pipeline (default: portraits)")
    add("--component", choices=COMPONENTS, default="unet", help="of the pipeline (default: %(default)s)")
    add("--output", type=Path, default=Path("outputs/dfu.onnx"), help="default: %(default)s")
    add(
        "--sizes",
        nargs="+",
        type=resolution,
        metavar="SIZE",
        default=[(32, 32), (64, 48), (33, 57)],
        help="HEIGHT or HEIGHTxWIDTH, to check (default: 32 64x48 33x57)",
    )
    add("--batch_size", type=count, default=2, help="of the check")
    return parser


def main(argv=None) -> None:
    args = get_parser().parse_args(argv)
    model = COMPONENTS[args.component].from_pretrained(args.model, subfolder=args.component)
    write_onnx(model, args.output)
    session = onnxruntime.InferenceSession(args.output, providers=["CPUExecutionProvider"])
    differences = {size: largest_difference(model, session, args.batch_size, *size) for size in args.sizes}
    for (height, width), difference in differences.items():
        print(f"{height}x{width}: largest difference from torch {difference:.1e}")
    if not all(difference <= TOLERANCE for difference in differences.values()):  # NaN is no agreement
        raise SystemExit(f"{args.output} differs from the model by more than {TOLERANCE}.")
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
