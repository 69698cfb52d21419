# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Generation, enlargement and inpainting of images with one model."""
