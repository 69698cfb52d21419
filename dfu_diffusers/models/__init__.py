# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""The network: spectral and dual convolutions, the UNet, LoRA, kernels for CPUs."""
