# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Training images from a folder, a zip or the Hub: one source image serves every resolution.

`load_table` opens the source with `datasets`. `ImageDataset` gives random access to its images, optionally through the
files of `build_cache`; `ImageStream` reads sources that are too large to download. Both take draws (index, (height,
width), number) from `dfu_diffusers.data.resolutions`. All randomness of an image is a function of (seed, number), so
it is the same in every process, worker and resumed run.

An image is rotated as its EXIF data say, laid over white where it is transparent, cropped to the requested aspect
ratio and resized with Pillow's antialiased Lanczos filter, in 8 bit. Images that cannot be used are named in a warning
and left out.
"""
