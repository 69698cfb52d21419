# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Training images: folders, caches, streams, portraits, and the schedule of resolutions."""
