"""Attention of `torch.nn`: the body of `F.multi_head_attention_forward`, run in sight of a tap.

To a TorchFunctionMode it is one function, out of whose sight its attention and dropout lie. Its own
code is run here with the mode in force: only the question whether somebody overrides it, which the
mode has answered, is not asked again.
"""

from __future__ import annotations

import types
from typing import Any

import torch.nn.functional as F
from torch import Tensor

FORWARD = F.multi_head_attention_forward


def multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What `F.multi_head_attention_forward` computes, function by function."""
    # of the moment: somebody may have replaced a function of the module
    seen = {**vars(F), "has_torch_function": _never}
    body = types.FunctionType(FORWARD.__code__, seen, FORWARD.__name__, FORWARD.__defaults__)
    body.__kwdefaults__ = FORWARD.__kwdefaults__
    result: tuple[Tensor, Tensor | None] = body(*args, **kwargs)
    return result


def _never(_: Any) -> bool:
    return False
