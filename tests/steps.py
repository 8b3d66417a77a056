"""One training step of a model of the zoo: dense, with SAGE, and by the oracle."""

import torch

import zoo
from accuracy import loss_and_gradients
from lightning_sage import SagePolicy, install
from oracle import oracle, replayed


def policy_of(**fields):
    # one sink and no replay choice, so that a test's subsets are what it asks for
    fields = {"replay": None, "sinks": 1} | fields
    return SagePolicy(**fields)


def told_blocks(name, policy):
    """The policy, told where the blocks of a model without transformers are."""
    if zoo.MODELS[name].model_type != "plain":
        return policy
    return SagePolicy(
        **vars(policy) | {"blocks": lambda module, _: type(module).__name__ == "PlainBlock"}
    )


def run(name, model, batch, autocast=False):
    """One step; the seed is for what draws outside of blocks."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), zoo.exactly(name):
        return loss_and_gradients(model, batch)


def sage_step(name, model, batch, policy, **options):
    """Loss and gradients of a sparse step, and the rows that each block replayed."""
    with install(model, told_blocks(name, policy)) as installation:
        loss, gradients = run(name, model, batch, **options)
        return loss, gradients, replayed(installation.records)


def oracle_step(name, model, batch, rows, mode, **options):
    with oracle(model, rows, mode):
        return run(name, model, batch, **options)


def trained(model, policy=None, steps=3):
    """A few steps of SGD on a language model; returns the installation, where there is a policy."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    installation = None if policy is None else install(model, policy)
    for step in range(steps):
        optimizer.zero_grad()
        model(**zoo.make_batch("llama", seed=step)).loss.backward()
        optimizer.step()
    return installation
