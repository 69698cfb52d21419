# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Training images from a folder, a zip or the Hub: one source image serves every resolution.

`load_table` opens the source with `datasets`. `ImageDataset` gives random access to its images, by way of the files
of `build_cache` if wanted; `ImageStream` reads what is too large to download. Both take draws (index, (height, width),
number), as `dfu_diffusers.data.resolutions` makes them, and all that is random about an image is a function of
(seed, number): the same image comes out of every process, worker and resumed run.

An image is turned as its EXIF data say, laid over white where it is transparent, cropped to the aspect ratio asked for
and resized with Pillow's antialiased Lanczos filter, in 8 bit. Those that cannot be used are named in a warning
and left out.
"""
