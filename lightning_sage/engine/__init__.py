"""One call of a block, from its arguments to its gradient.

In the order of reading: `axes`, `streams` and `arguments` (what a block is called with, and where
its tokens are); `intercept` with `attention_call`, `flash`, `follow`, `torch_attention` and
`positions` (how attention is seen); `drops`, `seen`, `sparse` and `replay` (what attention and
dropout do in a dense forward and in a replay); `packing` and `cache` (what waits in between);
`facts`, `masks`, `loss_rows`, `towers`, `saliency`, `session` (what is known of the batch, and
what is kept); `requests` and `sides` (what callers ask for); `modes`, `wrapped` and `job` (one
call); `comparer`, `trial`, `graph`, `dense_bytes`, `selfcheck` (its first); `backward` and `block`.
"""
