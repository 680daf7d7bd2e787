"""A row's log-sum-exp as Triton kernels are usually written, for comparison in the machine-code table.

It reduces a 1-D block over all threads in every iteration: shuffles and barriers in the loop, about twice the instructions.
"""

import triton
import triton.language as tl


@triton.jit
def lse_kernel(logits, lse, stride: tl.int64, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m, s = float("-inf"), 0.0
    for begin in range(0, vocab, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        top = tl.maximum(m, tl.max(x, 0))
        s = s * tl.exp(m - top) + tl.sum(tl.exp(x - top), 0)
        m = top
    tl.store(lse + row, m + tl.log(s))
