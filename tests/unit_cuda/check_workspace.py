# SPDX-License-Identifier: MIT
"""The workspaces of the GPU's ops: nothing beside one is written, a short or crooked one is refused, and so
is one whose plan was made for pointers that needed less.     python tests/unit_cuda/check_workspace.py"""

import ctypes
import sys

import torch
from attn_abi import AttnError, Call, KdaCall, MlaCall

GUARD = 4096


def randn(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def ints(*values):
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def empty(*shape):
    return torch.empty(shape, device="cuda")


def decode():
    q = randn(3, 1, 16, 128)
    return Call(
        q=q,
        k=randn(3, 3000, 2, 128),
        v=randn(3, 3000, 2, 128),
        seqused_k=ints(2900, 0, 333),
        out=torch.empty_like(q),
        lse=empty(3, 16, 1),
        num_splits=0,
    )


def append_and_prefill():
    """Rotary embedding turns q in the workspace."""
    q = randn(2, 150, 4, 64)
    return Call(
        q=q,
        k=randn(2, 500, 2, 64),
        v=randn(2, 500, 2, 64),
        k_new=randn(2, 150, 2, 64),
        v_new=randn(2, 150, 2, 64),
        rotary_cos=randn(500, 16),
        rotary_sin=randn(500, 16),
        seqused_k=ints(300, 0),
        out=torch.empty_like(q),
        lse=empty(2, 4, 150),
        causal=1,
    )


def latent():
    return MlaCall(
        q=randn(3, 2, 128, 576),
        k_cache=randn(60, 64, 1, 576),
        block_table=torch.randperm(60)[:57].view(3, 19).int().cuda(),
        cache_seqlens=ints(1200, 0, 70),
        out=torch.empty(3, 2, 128, 512, device="cuda", dtype=torch.bfloat16),
        lse=empty(3, 128, 2),
    )


def kda(shift=0):
    """160 pairs of sequence and head, dealt out in order; `shift` puts q's rows off 16 bytes."""
    q, *more = (randn(1, 400, 40, 128) for _ in range(4))
    q = randn(q.numel() + 8)[shift : shift + q.numel()].view(q.shape)
    return KdaCall(
        q=q,
        **dict(zip("kvg", more)),
        beta=randn(1, 400, 40),
        out=torch.empty_like(q),
        final_state=empty(4, 40, 128, 128),
        cu_seqlens=ints(0, 100, 100, 250, 400),
    )


def refused(call, workspace, size, wish):
    try:
        call.run_in(workspace, size)
    except AttnError as error:
        assert error.status == "WORKSPACE" and wish in str(error), str(error)
    else:
        raise AssertionError(f"not refused: {wish}")


def check(make):
    call = make()
    size = call.plan.workspace_bytes
    if not size:
        return "needs none"
    whole = torch.full((size + 2 * GUARD,), 0xA5, device="cuda", dtype=torch.uint8)
    inside = whole[GUARD : GUARD + size]
    call.run_in(inside, size)
    torch.cuda.synchronize()
    assert (whole[:GUARD] == 0xA5).all() and (whole[GUARD + size :] == 0xA5).all(), "written beside it"
    refused(call, inside, size - 1, f"expected {size} bytes")
    refused(call, whole[8:], size, "64")
    return f"{size} bytes"


def other_pointers():
    """What the plan saw on 16 bytes is off them in the call."""
    planned, other = kda(), kda(shift=1)
    planned.args.q = other.args.q
    refused(planned, planned.workspace, planned.plan.workspace_bytes, "plan and run differ")
    return "refused"


def no_plan():
    """kda_fwd without a plan: what needs no workspace runs, the rest is refused."""
    stream = torch.cuda.current_stream().cuda_stream
    out = torch.empty(2, 100, 3, 128, device="cuda", dtype=torch.bfloat16)
    dense = KdaCall(**{name: randn(*out.shape) for name in "qkvg"}, beta=randn(2, 100, 3), out=out)
    dense.run()
    want = out.clone()
    out.zero_()
    dense._check(dense.function(ctypes.byref(dense.args), None, None, 0, stream))
    assert torch.equal(out, want)
    ragged = kda()
    size = ragged.plan.workspace_bytes
    try:
        ragged._check(ragged.function(ctypes.byref(ragged.args), None, None, 0, stream))
    except AttnError as error:
        assert error.status == "WORKSPACE" and f"expected {size} bytes" in str(error), str(error)
    else:
        raise AssertionError("not refused")
    return "ok"


def main():
    failures = 0
    for name, run in (
        *((f.__name__, lambda f=f: check(f)) for f in (decode, append_and_prefill, latent, kda)),
        ("kda, copied", lambda: check(lambda: kda(shift=1))),
        ("kda, other pointers", other_pointers),
        ("kda, no plan", no_plan),
    ):
        try:
            print(f"{name:24} {run()}", flush=True)
        except (AssertionError, RuntimeError) as error:
            failures += 1
            print(f"{name:24} FAILED: {error}", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
