"""What the README's snippets take for granted: a module and its data, a model and a batch."""

import torch
from lightning import Trainer

import zoo
from lightning_sage import SageCallback
from tasks import Task


def names():
    task = Task(zoo.build("llama", dtype=torch.float32))
    batch = zoo.make_batch("llama", "right")
    shown_above = {"Trainer": Trainer, "SageCallback": SageCallback}
    return shown_above | {
        "module": task,
        "data": task.train_dataloader(),
        "model": task.model,
        "batch": batch,
    }
