# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""What `examples/train_dfu.py` is made of: options and what they ask for, losses, averages, checkpoints, reports."""
