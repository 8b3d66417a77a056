"""What the ops mean, in plain PyTorch: docstrings of record, and what runs where no kernel does.

Axes: B batch, T tokens, N packed query rows, M packed key rows, H query heads, G key/value heads
(H a multiple of G), D head width, E value width, C width.
"""

from lightning_sage.ops.reference.attention import Dropout as Dropout
from lightning_sage.ops.reference.attention import How as How
from lightning_sage.ops.reference.attention import attention_backward as attention_backward
from lightning_sage.ops.reference.attention import attention_forward as attention_forward
from lightning_sage.ops.reference.attention import attention_lse as attention_lse
from lightning_sage.ops.reference.attention import attention_received as attention_received
from lightning_sage.ops.reference.attention import mask_of as mask_of
from lightning_sage.ops.reference.attention import weights_dropout as weights_dropout
from lightning_sage.ops.reference.rows import LARGEST as LARGEST
from lightning_sage.ops.reference.rows import dropout_mask as dropout_mask
from lightning_sage.ops.reference.rows import dropout_threshold as dropout_threshold
from lightning_sage.ops.reference.rows import gather_rows as gather_rows
from lightning_sage.ops.reference.rows import pack_rows as pack_rows
from lightning_sage.ops.reference.rows import row_dropout as row_dropout
from lightning_sage.ops.reference.rows import row_norms as row_norms
from lightning_sage.ops.reference.rows import scatter_rows as scatter_rows
from lightning_sage.ops.reference.rows import stream_key as stream_key
from lightning_sage.ops.reference.rows import uniform as uniform
from lightning_sage.ops.reference.rows import unpack_rows as unpack_rows
from lightning_sage.ops.reference.rows import wide as wide
