#!/usr/bin/env python
"""A page to try a DFU model on in the browser: any height and width, one seed at many sizes, uploads enlarged.

    python examples/space/app.py [--model FOLDER_OR_HUB_ID] [--port 7860] [--share]

Without --model it shows the model that the environment variable DFU_MODEL names, or the shipped portraits. README.md
beside this file tells how to publish it as a Space.
"""

import argparse
import html
import os
import re
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from diffusers.utils.torch_utils import get_device
from gradio.utils import get_upload_folder
from huggingface_hub import ModelCard
from PIL import Image

from dfu_diffusers import DFUPipeline, DFUSuperResolutionPipeline, EDMHeunScheduler
from dfu_diffusers.data.resolutions import format_resolution, parse_resolution
from dfu_diffusers.decode import convert_picture, open_picture

HERE = Path(__file__).resolve().parent
MODEL = os.environ.get("DFU_MODEL", str(HERE.parent.parent / "checkpoints" / "dfu-portraits"))
HEUN = "EDM Heun"
SAMPLERS = {HEUN: EDMHeunScheduler, "EDM Euler": EDMEulerScheduler, "DPM-Solver++": EDMDPMSolverMultistepScheduler}
TILEABLE = ("none", "x", "y", "xy")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow would open many more, some by way of other programs
MAX_SEED, MAX_CHURN, MIN_STRENGTH, MAX_NOISE = 2**32 - 1, 20, 0.05, 0.5
MAX_SIZE_LENGTH = 20  # characters that a size in the list may take, with what stands between
BAR = gr.Progress()  # gradio looks for it among the defaults of a function

INTRODUCTION = """# {name}: pictures at any size
One set of weights draws at **whatever height and width you ask for**. Choose a size and press the
button. Keep the seed and change the size, and the same picture comes again."""
EXPECT = """This model's own size is {own} px. Every size runs; the further beyond its own, the more a picture can
lose.\n\n{about}"""
FONT = ["system-ui", "sans-serif"]  # the visitor's own: nothing is loaded from elsewhere
LAUNCH = {
    "max_file_size": "10mb",  # of an upload
    "theme": gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=FONT, font_mono=["monospace"]),
    # Small pictures are shown enlarged, pixels as squares, and all at once rather than in a box that scrolls.
    "css": """#pictures img, #upload img {image-rendering: pixelated}
        #pictures .grid-wrap {max-height: none; overflow: auto}""",
}


def from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not re.fullmatch("[1-9][0-9]{0,8}", value):
        sys.exit(f"The environment variable {name} must be a whole number from 1 up, not {value!r}.")
    return int(value)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, so that a small machine stays alive."""

    max_side: int = from_environment("DFU_MAX_SIDE", 256)  # in pixels
    max_pixels: int = from_environment("DFU_MAX_PIXELS", 65_536)  # of all pictures of a request together
    max_images: int = from_environment("DFU_MAX_IMAGES", 8)
    max_steps: int = from_environment("DFU_MAX_STEPS", 50)
    max_queue: int = from_environment("DFU_MAX_QUEUE", 20)  # requests that wait


class Studio:
    """A model, the limits, and what the buttons do. Requests share the network alone; each has its own sampler."""

    def __init__(self, model: str | Path, limits: Limits | None = None):
        self.limits = limits or Limits()
        self.pipe = DFUPipeline.from_pretrained(model).to(get_device())
        config, refiner = self.pipe.unet.config, self.pipe.refiner
        if config.in_channels not in (1, 3):
            raise ValueError(f"This page shows pictures of 1 or 3 channels, but {model} has {config.in_channels}.")
        self.strategies = ("direct", "cascade") if refiner is None else ("octaves",)
        own = (refiner or self.pipe.unet).config.sample_size
        self.own_size = tuple(own) if isinstance(own, (tuple, list)) else (own, own)  # (height, width), as everywhere
        self.channels, self.classes = config.in_channels, config.num_class_embeds
        self.name, self.about = read_card(model)
        self.running = {}  # session -> its latest run
        self.network = threading.Lock()  # a stopped run may still be in its last step when the next one begins

    def generate(self, height, width, count, strategy, tileable, seed, steps, sampler, churn, label,
                 request: gr.Request, progress=BAR):  # fmt: skip
        """Several seeds at one size."""
        most = self.limits.max_side
        size = checked("The height", height, 1, most), checked("The width", width, 1, most)
        count = checked("The number of pictures", count, 1, self.limits.max_images)
        yield from self.draw([size], count, strategy, tileable, seed, steps, sampler, churn, label, request, progress)

    def compare(self, sizes, strategy, tileable, seed, steps, sampler, churn, label,
                request: gr.Request, progress=BAR):  # fmt: skip
        """One seed at several sizes, a list such as "32, 48, 96x64"."""
        text, most = str(sizes or ""), self.limits.max_images
        if len(text) > MAX_SIZE_LENGTH * most:
            raise refusal(f"The list has {len(text):,} characters: write 1 to {most} sizes, such as 32, 48, 96x64.")
        text = " ".join(text.lower().replace("×", "x").replace(",", " ").split())
        words, sizes = text.replace(" x", "x").replace("x ", "x").split(), []
        if not 1 <= len(words) <= most:
            raise refusal(f"The list has {len(words)} sizes: write 1 to {most} of them, such as 32, 48, 96x64.")
        for word in words:
            try:
                sides = parse_resolution(word)
            except ValueError as error:
                raise refusal(f"{word} is no size: write HEIGHT or HEIGHTxWIDTH, such as 64 or 96x64.") from error
            sizes.append(tuple(checked(f"A side of {word}", side, 1, self.limits.max_side) for side in sides))
        sizes = list(dict.fromkeys(sizes))
        yield from self.draw(sizes, 1, strategy, tileable, seed, steps, sampler, churn, label, request, progress)

    def enlarge(self, picture, scale, strength, noise_level, consistency, seed, steps, sampler, churn, label,
                request: gr.Request, progress=BAR):  # fmt: skip
        """An uploaded picture, `scale` times as high and wide."""
        most = self.limits.max_side
        scale = checked("The factor", scale, 1, most, whole=False)
        if self.pipe.refiner is None:
            how = {"strength": checked("The strength", strength, MIN_STRENGTH, 1, whole=False)}
        else:
            how = {"noise_level": checked("The noise", noise_level, 0, MAX_NOISE, whole=False)}
        image = read_upload(picture, most, "L" if self.channels == 1 else "RGB")
        size = round(scale * image.height), round(scale * image.width)
        if max(size) > most:
            raise refusal(
                f"The picture would become {format_resolution(size)}, but a side has at most {most:,} pixels: choose "
                "a smaller factor or picture."
            )
        self.check_pixels(size[0] * size[1])
        inputs = {"image": image, "consistency": bool(consistency), **how}
        kind = DFUSuperResolutionPipeline
        yield from self.run(kind, inputs, [size], 1, seed, steps, sampler, churn, label, request, progress)

    def draw(self, sizes, count, strategy, tileable, *settings):
        """`count` pictures at each size, out of nothing."""
        strategy = chosen("strategy", strategy, self.strategies)
        tileable = chosen("tiling", tileable, TILEABLE)
        self.check_pixels(count * sum(height * width for height, width in sizes))
        inputs = {"batch_size": count, "strategy": strategy, "tileable": None if tileable == "none" else tileable}
        yield from self.run(DFUPipeline, inputs, sizes, count, *settings)

    def check_pixels(self, pixels):
        if pixels > self.limits.max_pixels:
            raise refusal(
                f"{pixels:,} pixels are more than the {self.limits.max_pixels:,} of one request: choose fewer or "
                "smaller pictures."
            )

    def run(self, kind, inputs, sizes, count, first_seed, steps, sampler, churn, label, request, progress):
        """Checks the rest and calls a pipeline of this kind for each size.

        Yields the gallery once: a PNG file and a caption for each size and seed.
        """
        first_seed = checked("The seed", first_seed, 0, MAX_SEED)
        steps = checked("The number of steps", steps, 1, self.limits.max_steps)
        churn = checked("The churn", churn, 0, MAX_CHURN, whole=False)
        label = checked("The class", label, 0, self.classes - 1) if self.classes else None
        sampler = chosen("sampler", sampler, SAMPLERS)

        options = {"s_churn": churn} if sampler == HEUN else {}  # the others have none
        scheduler = SAMPLERS[sampler].from_config(self.pipe.scheduler.config, **options)
        pipe = kind(**{**self.pipe.components, "scheduler": scheduler})
        pipe.set_progress_bar_config(disable=True)
        session, run, gallery = request and request.session_hash, object(), []
        self.running[session] = run

        def on_step_end(pipe, step, timestep, tensors):
            done = len(gallery) // count
            part = (step + 1) / pipe.num_timesteps
            reached = tuple(tensors["latents"].shape[-2:])  # a cascade begins small, and so do octaves
            now = "" if reached == sizes[done] else f", now at {format_resolution(reached)}"
            progress((done + part) / len(sizes), desc=f"Drawing {format_resolution(sizes[done])}{now}")
            pipe._interrupt = self.running.get(session) is not run
            return {}

        with tempfile.TemporaryDirectory() as folder:  # gradio copies the files before it asks for more
            try:
                for size in sizes:
                    seeds = range(first_seed, first_seed + count)
                    with self.network:
                        images = pipe(
                            **inputs,
                            height=size[0],
                            width=size[1],
                            num_inference_steps=steps,
                            class_labels=label,
                            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                            callback_on_step_end=on_step_end,
                        ).images
                    if pipe.interrupt:
                        raise gr.Error("Stopped: press the button again for a new run.", print_exception=False)
                    for seed, image in zip(seeds, images):
                        path = Path(folder) / f"seed{seed}_{format_resolution(size)}.png"
                        image.save(path)
                        gallery.append((str(path), f"{format_resolution(size)}, seed {seed}"))
            except ValueError as error:  # what this model cannot do, such as to join its edges
                raise refusal(str(error)) from error
            finally:
                if self.running.get(session) is run:
                    self.running.pop(session, None)
            yield gallery

    def stop(self, request: gr.Request) -> None:
        """Ends the session's run before its next step; also called when a visitor leaves."""
        self.running.pop(request and request.session_hash, None)


def checked(name: str, value, low: int, high: int, whole: bool = True) -> float:
    """`value` if it is a number that fits, or an error that tells what does."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (whole and value != int(value)):
        wrong = "is missing" if value in (None, "") else f"cannot be {str(value)[:20]}"
        raise refusal(f"{name} {wrong}: choose a {'whole ' if whole else ''}number from {low} to {high:,}.")
    return int(value) if whole else value


def chosen(name: str, value, choices) -> str:
    """`value` if it is one of the choices, or an error that tells them."""
    if value not in list(choices):
        raise refusal(f"There is no {name} {str(value)[:20]}: choose one of {', '.join(choices)}.")
    return value


def read_upload(picture: dict | None, max_side: int, mode: str) -> Image.Image:
    """The picture that was uploaded as gradio's `picture`, upright and opaque in this mode of Pillow, or an error: its
    pixels are read only if few."""
    path = (picture or {}).get("path")
    if not path:
        raise refusal("The picture is missing: upload one.")
    if not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):  # asked for by hand
        raise refusal("This picture was not uploaded: upload it.")
    try:
        with open_picture(path, FORMATS) as image:
            if max(image.size) <= max_side:
                return convert_picture(image, mode)
            size = format_resolution(image.size[::-1])
    except Image.DecompressionBombError as error:
        raise refusal(f"The picture is far too large: a side has at most {max_side:,} pixels.") from error
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise refusal(f"This file cannot be read: upload a picture of type {', '.join(FORMATS)}.") from error
    raise refusal(f"The picture has {size} pixels, but a side has at most {max_side:,}: upload a smaller one.")


def refusal(message: str) -> gr.Error:
    """gradio shows messages as HTML, and they quote what was typed."""
    return gr.Error(html.escape(message, quote=False), print_exception=False)


def read_card(model: str | Path) -> tuple[str, str]:
    """The title of the model's card, and its introduction and limits in Markdown; nothing where it has none."""
    try:
        source = Path(model) / "README.md" if Path(model).is_dir() else model
        card = ModelCard.load(source, ignore_metadata_errors=True).text
    except (OSError, ValueError):  # no card, or none that can be had
        card = ""
    card = re.sub(r"!\[[^]\n]{0,300}]\([^)\n]{0,300}\)", "", card)  # the pictures stay with it
    sections = dict(re.findall(r"^#{1,2} ([^\n]+)\n(.*?)(?=^#|\Z)", card, re.M | re.S))
    title = next(iter(sections), Path(model).name)
    return title, "\n\n".join(sections.get(name, "").strip() for name in (title, "Limits"))


def build(studio: Studio) -> gr.Blocks:
    """The page: on the left a tab for each way to ask, and what they share; the pictures on the right.

    A new way is one more tab with a button, and one more of the `runs`.
    """
    limits, (height, width) = studio.limits, (min(side, studio.limits.max_side) for side in studio.own_size)
    count = max(1, min(4, limits.max_images, limits.max_pixels // (height * width)))
    # Half the model's own size, three quarters of it, all of it, and a larger one that is not square.
    several = [
        max(1, height // 2),
        max(1, 3 * height // 4),
        height,
        f"{min(3 * height // 2, limits.max_side)}x{height}",
    ]
    several = ", ".join(map(str, several[: limits.max_images]))
    classes = list(range(studio.classes or 0))
    own_sampler = [name for name, kind in SAMPLERS.items() if kind.__name__ == type(studio.pipe.scheduler).__name__]
    # Pictures leave the server's disk after an hour or two.
    with gr.Blocks(title=f"{studio.name} at any size", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(INTRODUCTION.format(name=studio.name))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                dice = gr.Button("Roll the dice", render=False)
                seed = gr.Number(0, label="Seed: which picture", precision=0, buttons=[dice], elem_id="seed")
                with gr.Tab("Generate"):
                    height = gr.Slider(1, limits.max_side, height, step=1, label="Height in pixels", elem_id="height")
                    width = gr.Slider(1, limits.max_side, width, step=1, label="Width in pixels", elem_id="width")
                    images = gr.Slider(
                        1, limits.max_images, count, step=1, label="Pictures, each of the next seed", elem_id="count"
                    )
                    generate = gr.Button("Generate", variant="primary", elem_id="generate")
                with gr.Tab("One seed, many sizes"):
                    info = "HEIGHT or HEIGHTxWIDTH, with commas between"
                    sizes = gr.Textbox(several, label="Sizes in pixels", info=info, elem_id="sizes")
                    compare = gr.Button("Draw at each size", variant="primary", elem_id="compare")
                with gr.Tab("Enlarge a picture"):
                    upload = {"type": "filepath", "sources": ["upload", "clipboard"], "height": 240}
                    picture = gr.Image(label="Picture", elem_id="upload", **upload)
                    scale = gr.Number(2, label="Factor, such as 2 or 2.7", step=0.1, elem_id="scale")
                    info = "how much is drawn anew"
                    strength = gr.Slider(
                        MIN_STRENGTH, 1, 0.2, step=0.05, label="Strength", info=info, visible=not studio.pipe.refiner
                    )
                    info = "of the picture: more for a compressed one"
                    noise = gr.Slider(
                        0, MAX_NOISE, 0, step=0.01, label="Noise", info=info, visible=bool(studio.pipe.refiner)
                    )
                    info = "averaged back to its size, the result is the picture itself"
                    consistency = gr.Checkbox(True, label="Keep the original", info=info)
                    enlarge = gr.Button("Enlarge", variant="primary", elem_id="enlarge")
                stop = gr.Button("Stop", size="sm", elem_id="stop")
                label = gr.Dropdown(classes, value=0 if classes else None, label="Class", visible=bool(classes))
                with gr.Accordion("Advanced", open=False):
                    info = (
                        "Drawing beyond the model's own size. cascade: a small picture is drawn, enlarged, and its "
                        "detail drawn anew."
                    )
                    strategy = gr.Radio(
                        list(studio.strategies), value=studio.strategies[0], label="Strategy", info=info,
                        visible=len(studio.strategies) > 1,
                    )  # fmt: skip
                    info = "Drawing pictures that repeat without a seam: to the side (x), upwards (y) or both."
                    tileable = gr.Radio(list(TILEABLE), value="none", label="Tileable", info=info)
                    steps = gr.Slider(1, limits.max_steps, min(18, limits.max_steps), step=1, label="Steps")
                    sampler = gr.Radio(list(SAMPLERS), value=(own_sampler or [HEUN])[0], label="Sampler")
                    churn = gr.Slider(0, MAX_CHURN, 0, step=0.5, label="Churn: fresh noise at each EDM Heun step")
            with gr.Column(scale=3, min_width=300):
                shown = {"columns": 2, "object_fit": "contain", "buttons": ["download", "download_all", "fullscreen"]}
                pictures = gr.Gallery(label="Pictures", interactive=False, elem_id="pictures", **shown)
                with gr.Accordion("What to expect at which size"):
                    gr.Markdown(EXPECT.format(own=format_resolution(studio.own_size), about=studio.about))

        # Without preprocessing it is `checked` that refuses a value, for it names the remedy, too.
        one_at_a_time = {"outputs": pictures, "preprocess": False, "concurrency_id": "network", "concurrency_limit": 1}
        settings, layout = [seed, steps, sampler, churn, label], [strategy, tileable]
        runs = [
            generate.click(studio.generate, [height, width, images, *layout, *settings], **one_at_a_time),
            compare.click(studio.compare, [sizes, *layout, *settings], **one_at_a_time),
            enlarge.click(studio.enlarge, [picture, scale, strength, noise, consistency, *settings], **one_at_a_time),
        ]
        dice.click(None, outputs=seed, js="() => Math.floor(1e6 * Math.random())")
        stop.click(studio.stop, cancels=runs, queue=False, api_visibility="private")
        page.unload(studio.stop)
    return page.queue(max_size=limits.max_queue)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="folder of a saved pipeline, or its id on the Hub")
    parser.add_argument("--port", type=int, help="default: 7860, or the next that is free")
    parser.add_argument("--share", action="store_true", help="make a public link, through gradio's servers")
    args = parser.parse_args(argv)
    if not Path(args.model).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.model):
        parser.error(f"there is no folder {args.model}: --model or DFU_MODEL names a saved pipeline or its Hub id")
    try:
        studio = Studio(args.model)
    except (OSError, ValueError) as error:  # no such model, or none to be shown: the message says why
        parser.error(str(error))
    build(studio).launch(server_port=args.port, share=args.share, **LAUNCH)


if __name__ == "__main__":
    main()
