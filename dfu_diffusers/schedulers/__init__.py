# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""EDM's sampler."""
