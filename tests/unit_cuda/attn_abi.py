# SPDX-License-Identifier: MIT
"""The C ABI of libattn over ctypes, for torch tensors: what the GPU checks and benches call, so that
they need neither the binding nor the packages.  The library is $ATTN_LIB or build*/libattn.so.
Structs repeat include/attn/attn.h; `size` catches a difference."""

import ctypes as C
import glob
import os
import pathlib

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
DTYPES = {
    torch.float32: (2, 32),
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
}
STATUS = ("OK", "SHAPE", "DTYPE", "VALUE", "DEVICE", "NOT_BUILT", "WORKSPACE", "VERSION", "DRIVER")


class DLTensor(C.Structure):
    _fields_ = [
        ("data", C.c_void_p),
        ("device_type", C.c_int32),
        ("device_id", C.c_int32),
        ("ndim", C.c_int32),
        ("code", C.c_uint8),
        ("bits", C.c_uint8),
        ("lanes", C.c_uint16),
        ("shape", C.POINTER(C.c_int64)),
        ("strides", C.POINTER(C.c_int64)),
        ("byte_offset", C.c_uint64),
    ]


TENSORS = [
    "q",
    "k",
    "v",
    "k_new",
    "v_new",
    "qv",
    "out",
    "lse",
    "out_accum",
    "lse_accum",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "cu_seqlens_k_new",
    "seqused_q",
    "seqused_k",
    "page_table",
    "kv_batch_idx",
    "leftpad_k",
    "rotary_cos",
    "rotary_sin",
    "seqlens_rotary",
    "q_descale",
    "k_descale",
    "v_descale",
    "sinks",
    "cp_tot_seqused_k",
    "scheduler_metadata",
]
INTS64 = ["max_seqlen_q", "max_seqlen_k", "window_left", "window_right", "attention_chunk"]
INTS32 = [
    "causal",
    "rotary_interleaved",
    "num_splits",
    "pack_gqa",
    "sm_margin",
    "cp_world_size",
    "cp_rank",
    "reserved",
]
DEFAULTS = {"window_left": -1, "window_right": -1, "num_splits": 1, "pack_gqa": -1}


class Args(C.Structure):
    _fields_ = (
        [("size", C.c_uint32), ("threads", C.c_int32)]
        + [(name, C.POINTER(DLTensor)) for name in TENSORS]
        + [("softmax_scale", C.c_double), ("softcap", C.c_double)]
        + [(name, C.c_int64) for name in INTS64]
        + [(name, C.c_int32) for name in INTS32]
    )


MLA_TENSORS = ["q", "k_cache", "block_table", "cache_seqlens", "descale_q", "descale_k", "out", "lse"]


class MlaArgs(C.Structure):
    _fields_ = (
        [("size", C.c_uint32), ("threads", C.c_int32)]
        + [(name, C.POINTER(DLTensor)) for name in MLA_TENSORS]
        + [("softmax_scale", C.c_double), ("head_dim_v", C.c_int64)]
        + [("causal", C.c_int32), ("reserved", C.c_int32)]
    )


class MlaPlan(C.Structure):
    _fields_ = [
        ("size", C.c_uint32),
        ("reserved", C.c_int32),
        ("workspace_bytes", C.c_int64),
        ("shape", C.c_int64 * 16),
        ("tile", C.c_int64 * 16),
        ("kernel", C.c_char * 96),
    ]


KDA_TENSORS = [
    "q",
    "k",
    "v",
    "g",
    "beta",
    "out",
    "A_log",
    "dt_bias",
    "initial_state",
    "final_state",
    "cu_seqlens",
    "state_indices",
    "checkpoint_states",
]


class KdaArgs(C.Structure):
    _fields_ = (
        [("size", C.c_uint32), ("threads", C.c_int32)]
        + [(name, C.POINTER(DLTensor)) for name in KDA_TENSORS]
        + [("scale", C.c_double), ("lower_bound", C.c_double), ("checkpoint_every", C.c_int64)]
        + [("gate_activated", C.c_int32), ("beta_activated", C.c_int32)]
    )


class KdaPlan(C.Structure):
    _fields_ = [
        ("size", C.c_uint32),
        ("reserved", C.c_int32),
        ("workspace_bytes", C.c_int64),
        ("shape", C.c_int64 * 8),
        ("tile", C.c_int64 * 8),
        ("kernel", C.c_char * 96),
    ]


class CombineArgs(C.Structure):
    _fields_ = [("size", C.c_uint32), ("threads", C.c_int32)] + [
        (name, C.POINTER(DLTensor)) for name in ("out_partial", "lse_partial", "out", "lse")
    ]


class Plan(C.Structure):
    _fields_ = [
        ("size", C.c_uint32),
        ("splits", C.c_int32),
        ("workspace_bytes", C.c_int64),
        ("piece", C.c_int64),
        ("shape", C.c_int64 * 12),
        ("tile", C.c_int64 * 8),
        ("kernel", C.c_char * 96),
    ]


def load():
    path = os.environ.get("ATTN_LIB") or sorted(glob.glob(str(ROOT / "build*/libattn.so*")))[0]
    lib = C.CDLL(path)
    lib.attn_last_error.restype = C.c_char_p
    lib.attn_split_combine_run.argtypes = [C.POINTER(CombineArgs), C.c_void_p]
    lib.attn_mha_fwd_plan.argtypes = [C.POINTER(Args), C.POINTER(Plan)]
    lib.attn_mha_fwd_run.argtypes = [C.POINTER(Args), C.POINTER(Plan), C.c_void_p, C.c_int64, C.c_void_p]
    lib.attn_mla_decode_plan.argtypes = [C.POINTER(MlaArgs), C.POINTER(MlaPlan)]
    lib.attn_mla_decode_run.argtypes = [
        C.POINTER(MlaArgs),
        C.POINTER(MlaPlan),
        C.c_void_p,
        C.c_int64,
        C.c_void_p,
    ]
    lib.attn_kda_fwd_plan.argtypes = [C.POINTER(KdaArgs), C.POINTER(KdaPlan)]
    lib.attn_kda_fwd_run.argtypes = [
        C.POINTER(KdaArgs),
        C.POINTER(KdaPlan),
        C.c_void_p,
        C.c_int64,
        C.c_void_p,
    ]
    return lib


LIB = load()


def describe(t):
    code, bits = DTYPES[t.dtype]
    n = t.dim()
    return DLTensor(
        t.data_ptr(),
        2 if t.is_cuda else 1,
        t.device.index or 0,
        n,
        code,
        bits,
        1,
        (C.c_int64 * n)(*t.shape),
        (C.c_int64 * n)(*t.stride()),
        0,
    )


class AttnError(RuntimeError):
    def __init__(self, status):
        self.status = STATUS[status]
        super().__init__(f"ATTN_E_{self.status}: {LIB.attn_last_error().decode()}")


class Call:
    """One prepared mha_fwd call: `run()` launches it on the current stream."""

    ARGS, PLAN, DEFAULTS = Args, Plan, DEFAULTS
    OP, SCALE = "attn_mha_fwd", "softmax_scale"

    def __init__(self, **arguments):
        values = {**self.DEFAULTS, **arguments}
        values.setdefault(self.SCALE, values["q"].shape[-1] ** -0.5)
        self.args = self.ARGS(size=C.sizeof(self.ARGS))
        self.function = getattr(LIB, self.OP + "_run")
        self.keep = []
        for name, value in values.items():
            if value is None:
                continue
            if isinstance(value, torch.Tensor):
                self.keep += [value, describe(value)]
                value = C.pointer(self.keep[-1])
            setattr(self.args, name, value)
        self.plan = self.PLAN(size=C.sizeof(self.PLAN))
        plan = getattr(LIB, self.OP + "_plan")
        self._check(plan(C.byref(self.args), C.byref(self.plan)))
        self.workspace = torch.empty(
            max(self.plan.workspace_bytes, 1), dtype=torch.uint8, device=values["q"].device
        )

    @staticmethod
    def _check(status):
        if status:
            raise AttnError(status)

    @property
    def kernel(self):
        return self.plan.kernel.decode()

    def run(self):
        self.run_in(self.workspace, self.plan.workspace_bytes)

    def run_in(self, workspace, size):
        stream = torch.cuda.current_stream().cuda_stream
        self._check(self.function(C.byref(self.args), C.byref(self.plan), workspace.data_ptr(), size, stream))


class MlaCall(Call):
    """The same for mla_decode."""

    ARGS, PLAN, DEFAULTS = MlaArgs, MlaPlan, {"head_dim_v": 512}
    OP = "attn_mla_decode"


class KdaCall(Call):
    """The same for kda_fwd."""

    ARGS, PLAN, DEFAULTS = KdaArgs, KdaPlan, {"lower_bound": -5.0}
    OP, SCALE = "attn_kda_fwd", "scale"


def split_combine(**tensors):
    args = CombineArgs(size=C.sizeof(CombineArgs))
    described = {name: describe(t) for name, t in tensors.items()}
    for name, d in described.items():
        setattr(args, name, C.pointer(d))
    status = LIB.attn_split_combine_run(C.byref(args), torch.cuda.current_stream().cuda_stream)
    if status:
        raise AttnError(status)
