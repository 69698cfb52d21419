# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""What `examples/evaluate_dfu.py` is made of: sources of images, collections of them, their figures."""
