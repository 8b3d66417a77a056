"""Several ranks on one CPU: forked processes in a gloo group, none of which can outlive a test."""

import io
import mmap
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# seconds after which a collective that not every rank has joined raises
COLLECTIVE = 30
# seconds in which the other ranks may say what they died of
AFTERMATH = 2


def ranks(world, function, *args, timeout=120, group=True):
    """What ``function(rank, *args)`` returns on each rank; forked, so it may be any closure.

    Args:
        world: Number of processes.
        function: Runs in each of them; its result is pickled.
        *args: Passed on.
        timeout: Seconds until every process is killed and the test fails.
        group: Whether a gloo group is there already. Else the environment is that of torchrun,
            which a Trainer takes for its own.

    Raises:
        AssertionError: A process raised (with its traceback), died, or took too long.
    """
    if torch.cuda.is_available():
        pytest.skip("autograd with a GPU's threads cannot be forked: set CUDA_VISIBLE_DEVICES=''")
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "tests",
        }
        store = f"file://{Path(folder) / 'store'}" if group else None
        context = multiprocessing.get_context("fork")
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(
                target=_work, args=(rank, world, store, environment, pipes, function, args)
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            return _collect([receiver for receiver, _ in pipes], timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _work(rank, world, store, environment, pipes, function, args):
    sender = pipes[rank][1]
    # whoever holds another's end keeps its death from being seen
    for _, other in pipes:
        if other is not sender:
            other.close()
    # what the test's process had caught is none of this one's business
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        if store is not None:
            wait_at_most = timedelta(seconds=COLLECTIVE)
            dist.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=world, timeout=wait_at_most
            )
            # nobody leaves while another still connects
            dist.barrier()
        torch.manual_seed(0)
        _send(sender, None, function(rank, *args))
    except BaseException:
        _send(sender, f"rank {rank} raised:\n{traceback.format_exc()}", None)
    finally:
        sender.close()
        # neither exit handlers nor fixtures of the test's process run here
        os._exit(0)


def _send(sender, error, value):
    # as bytes: tensors would travel as file descriptors, which die with their process
    buffer = io.BytesIO()
    torch.save((error, value), buffer)
    sender.send_bytes(buffer.getvalue())


def _collect(receivers, timeout):
    results, errors, deadline = {}, {}, time.monotonic() + timeout
    while len(results) + len(errors) < len(receivers):
        missing = [i for i in range(len(receivers)) if i not in results and i not in errors]
        left = max(0, deadline - time.monotonic())
        ready = wait([receivers[i] for i in missing], timeout=left)
        if not ready and errors:
            break
        assert ready, f"ranks {missing} did not finish within {timeout} s"
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                error, value = torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False)
            except EOFError:
                error, value = f"rank {rank} died", None
            if error is None:
                results[rank] = value
            else:
                # what one rank says may only follow from what another will say in a moment
                errors[rank] = error
                deadline = min(deadline, time.monotonic() + AFTERMATH)
    assert not errors, "\n".join(errors.values())
    return [results[rank] for rank in range(len(receivers))]


def free_port():
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def whole(x):
    """A tensor, gathered where it is sharded; all ranks have to ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def resident(size):
    """So many bytes that the process holds for as long as it holds the tensor, and no longer.

    The C library may serve what torch allocates from memory that earlier tests freed, and keep it
    afterwards: then neither is seen.
    """
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).fill_(1)
