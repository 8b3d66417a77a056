"""What a dense forward of a block would have saved for its backward pass."""

from __future__ import annotations

import torch

from lightning_sage.engine.job import Job
from lightning_sage.memory import saved_bytes


def dense_bytes(job: Job) -> int:
    """Bytes that a dense forward of the block saves for backward; its graph is dropped at once.

    Parameters, buffers and arguments that blocks share are not counted.
    """
    block = job.block
    there = [*block.parameters(), *block.buffers(), *job.leaves().values()]
    hidden = job.hidden.detach().requires_grad_()
    with torch.enable_grad(), job.surroundings.restored(), saved_bytes(exclude=there) as held:
        args, kwargs = job.arguments.call({job.arguments.hidden: hidden})
        output = job.own(args, kwargs)
        bytes_held = held()
    del output
    return bytes_held
