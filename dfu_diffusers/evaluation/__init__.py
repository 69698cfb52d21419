# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""What `examples/evaluate_dfu.py` is made of: sources of images, collections of them on the disk, and their figures.

A *source* draws image number i at a size: a model from seed i (`ModelSource`), upsampling from the images of another
collection (`Resized`), or real images (`Portraits`, `Pictures`). An image depends on its number, not on those drawn
beside it. A `Collection` keeps a range of them with their features, and `METRICS` compares collections.

All images are kept in 8 bit, real and generated ones alike, and grey ones are shown to extractors as colour.
"""
