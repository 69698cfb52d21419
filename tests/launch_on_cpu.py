"""train_dfu.py in processes on CPUs with gloo, whatever configuration `accelerate launch` brings.

Accelerate offers FSDP and DeepSpeed to accelerators alone, though both run on CPUs. Here it is told otherwise.
"""

import os
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


def main() -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    from examples import train_dfu

    train_dfu.main(sys.argv[1:])


if __name__ == "__main__":
    main()
