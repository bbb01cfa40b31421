"""The loss of single tokens from logits, read once: torch's log-softmax reads them twice and writes as many.

A Triton kernel, one program a row; `kernels` runs it. On an H200 it takes 0.26 ms for 2,048 rows of 128,256 logits,
log-softmax 1.03 and Liger's cross-entropy 0.40. Importing this fails where there is no Triton.
"""

import triton
import triton.language as tl


@triton.jit
def loss_kernel(logits, labels, losses, vocabulary, stride, BLOCK: tl.constexpr = 4096):
    """logsumexp(logits[row]) - logits[row, labels[row]], NaN where a logit is; float32."""
    row = tl.program_id(0).to(tl.int64)
    mine = logits + row * stride
    # for each of BLOCK columns the greatest logit so far, and the sum of what is relative to it
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = tl.load(mine + column, mask=column < vocabulary, other=float("-inf"))
        now = tl.maximum(greatest, logit)
        least = tl.where(now == float("-inf"), 0.0, now)  # -inf - -inf would be NaN
        total = total * tl.exp(greatest - least) + tl.exp(logit - least)
        greatest = now
    highest = tl.max(greatest, 0)
    rest = tl.log(tl.sum(total * tl.exp(greatest - highest), 0))
    # the difference first: beside a large logit the logarithm would be rounded away
    tl.store(losses + row, (highest - tl.load(mine + tl.load(labels + row))) + rest)
