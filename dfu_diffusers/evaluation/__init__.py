# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Parts of `examples/evaluate_dfu.py`: sources of images, collections of images on disk, and their figures.

A *source* draws image number i at a size: a model from seed i (`ModelSource`), upsampling from the images of another
collection (`Resized`), or real images (`Portraits`, `Pictures`). An image depends only on its number, not on the other
images of a batch. A `Collection` keeps a range of images with their features, and `METRICS` compares collections.

All images, real and generated, are kept in 8 bit. Grey images are converted to colour for extractors.
"""
