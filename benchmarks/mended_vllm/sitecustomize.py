"""vLLM for CPUs, 0.32.0, with one function mended, for a certificate that tells this fault from others.

    PYTHONPATH=benchmarks/mended_vllm vllm serve ... --speculative-config '{"method": "ngram", ...}'

Its rejection sampler divides the target's logits by each request's temperature, repeated for each drafted token. On a
CPU ``_expand_kernel_impl`` makes that: it hands a copy of the output in int64 to the core and drops the copy, so the
temperatures (floats) stay whatever was in memory. Python imports this file by itself where it is on the path.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.utils.cpu_triton_utils as fallbacks


def expand(
    output: torch.Tensor,
    values: torch.Tensor,
    ends: torch.Tensor,
    replace_from: Any,
    replace_to: Any,
    *_: Any,
    **__: Any,
) -> None:
    """Each request's value once for each of its drafted tokens. ``ends`` [requests]: where its tokens end."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    output.copy_(torch.where(values == replace_from, replace_to, values).repeat_interleave(counts))


fallbacks._expand_kernel_impl = expand
