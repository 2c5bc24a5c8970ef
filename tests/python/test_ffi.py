# SPDX-License-Identifier: MIT
"""The binding and the loader: error classes, types by name, versions, threads, forks, the report."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import abi
import libattn
import pytest
import torch
from libattn import _native, errors, mha

SHAPE = (1, 3, 2, 16)


def tensors():
    return torch.randn(3, *SHAPE).bfloat16().unbind(0)


def python(*args, **environment):
    """A fresh interpreter's completed process; an environment value of None removes the variable."""
    env = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=env)


# ---- errors ------------------------------------------------------------------------------------------

BASES = {
    "ShapeError": (ValueError, RuntimeError),
    "DtypeError": (TypeError, RuntimeError),
    "ArgumentError": (ValueError, RuntimeError),
    "DeviceError": (ValueError, RuntimeError),
    "NotBuiltError": (NotImplementedError, RuntimeError),
    "WorkspaceError": (RuntimeError,),
    "VersionError": (RuntimeError,),
    "DriverError": (RuntimeError,),
    "InternalError": (RuntimeError,),
}


@pytest.mark.parametrize("name", BASES)
def test_error_classes(name):
    assert getattr(errors, name) in errors.ALL
    assert getattr(libattn, name) is getattr(errors, name)
    assert all(issubclass(getattr(errors, name), base) for base in BASES[name])


def bad_calls():
    q, k, v = tensors()
    return {
        "ShapeError": ("q: expected", lambda: mha.mha_fwd(q[0], k, v)),
        "DtypeError": ("k: expected dtype bf16, got fp16", lambda: mha.mha_fwd(q, k.half(), v)),
        "ArgumentError": ("num_splits: expected", lambda: mha.mha_fwd(q, k, v, num_splits=257)),
    }


@pytest.mark.parametrize("name", ["ShapeError", "DtypeError", "ArgumentError"])
def test_a_status_becomes_its_class(name):
    message, call = bad_calls()[name]
    with pytest.raises(getattr(errors, name)) as caught:
        call()
    assert type(caught.value) is getattr(errors, name)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qv": 3}, "qv: expected a tensor or None, got int"),
        ({"cu_seqlens_q": "x"}, "cu_seqlens_q: expected a tensor or None, got str"),
        ({"max_seqlen_q": 1.5}, "max_seqlen_q: expected an int of 64 bits, got float"),
        ({"max_seqlen_k": None}, "max_seqlen_k: expected an int of 64 bits, got None"),
        ({"num_splits": "2"}, "num_splits: expected an int, got str"),
        ({"softcap": "2"}, "softcap: expected a float, got str"),
        ({"softmax_scale": "2"}, "softmax_scale: expected a float, got str"),
        ({"causal": 0.5}, "causal: expected a bool, got float"),
        ({"window_left": (1, 2)}, "window_left: expected an int of 64 bits, got a list or tuple"),
        ({"cp_rank": {}}, "cp_rank: expected an int, got a dict"),
        ({"sinks": torch.float32}, "sinks: expected a tensor or None, got"),
    ],
)
def test_a_wrong_type_is_named(arguments, message):
    with pytest.raises(TypeError) as caught:
        mha.mha_fwd(*tensors(), **arguments)
    assert str(caught.value).startswith(message)


def test_what_is_no_tensor():
    q, k, v = tensors()
    with pytest.raises(TypeError, match="q: expected a tensor, got a list or tuple"):
        mha.mha_fwd([1], k, v)
    with pytest.raises(TypeError, match="v: expected a tensor, got None"):
        mha.mha_fwd(q, k, None)


@pytest.mark.parametrize(
    ("name", "value"), [("num_splits", 2**31), ("sm_margin", -(2**31) - 1), ("cp_rank", 2**40)]
)
def test_ints_beyond_32_bits_are_refused(name, value):
    with pytest.raises(errors.ArgumentError, match=f"{name}: expected an int of 32 bits"):
        mha.mha_fwd(*tensors(), **{name: value})


@pytest.mark.parametrize("name", ["num_splits", "max_seqlen_q", "window_left"])
def test_ints_beyond_64_bits_are_refused(name):
    # ValueError from 0.1.15 on; before, tvm-ffi itself raises OverflowError.
    with pytest.raises((errors.ArgumentError, OverflowError)):
        mha.mha_fwd(*tensors(), **{name: 2**70})


def test_unknown_features_are_refused():
    with pytest.raises(TypeError, match="'alibi'"):
        mha.mha_fwd(*tensors(), alibi=None)


@pytest.mark.parametrize("count", [0, 13, 44, 60])
def test_wrong_number_of_arguments(count):
    with pytest.raises(TypeError, match=f"mha_fwd: expected 14 to 43 arguments, got {count}"):
        _native.mha_fwd(*[None] * count)


def test_features_are_what_the_binding_reads():
    _native.mha_fwd(*native_arguments(), *mha.FEATURES.values(), None, None)


def native_arguments():
    q, k, v = tensors()
    return (q, k, v, torch.empty_like(q), None, 0.25, False, -1, -1, 0.0, 0, 1, 1, False)


def test_arguments_are_not_kept():
    args = native_arguments()
    before = [sys.getrefcount(x) for x in args[:4]]
    for _ in range(50):
        _native.mha_fwd(*args)
        with pytest.raises(TypeError):
            _native.mha_fwd(*args, 1)
    assert [sys.getrefcount(x) for x in args[:4]] == before


def test_hidden_outputs_change_nothing():
    q, k, v = (torch.randn(2, s, h, 64).bfloat16() for s, h in ((5, 4), (900, 2), (900, 2)))
    out, lse = mha.mha_fwd(q, k, v, num_splits=4)
    out4, lse4, out_accum, lse_accum = mha.mha_fwd(q, k, v, num_splits=4, want_accum=True)
    alone, no_lse, _, _ = mha.attend(q, k, v, None, False, -1, -1, 0.0, 0, 4, None, False)
    assert no_lse is None
    assert torch.equal(out, out4) and torch.equal(out, alone) and torch.equal(lse, lse4)
    assert out_accum.shape == (4, 2, 4, 5, 64) and lse_accum.shape == (4, 2, 4, 5)
    merged, merged_lse = torch.empty(2, 5, 4, 64), torch.empty(2, 4, 5).transpose(1, 2)
    libattn.split_combine(out_accum.transpose(2, 3), lse_accum.transpose(2, 3), merged, merged_lse)
    torch.testing.assert_close(merged.bfloat16(), out)
    torch.testing.assert_close(merged_lse.transpose(1, 2), lse)


def test_plan_names_a_kernel():
    plan = libattn.mha_fwd_plan(*tensors(), num_splits=1)
    assert plan.kernel.startswith("attn_mha_") and plan.splits == 1 and plan.workspace_bytes >= 0
    with pytest.raises(errors.ShapeError):
        libattn.mha_fwd_plan(*(x[0] for x in tensors()))


def negated_calls():
    """{argument: call of a function of libattn in which it is a negated view}."""
    n = torch._neg_view
    x, lse = torch.randn(1, 3, 2, 64), torch.randn(1, 3, 2)
    q, cache = torch.randn(1, 1, 2, 576), torch.randn(1, 64, 1, 576)
    table, lens, beta = torch.zeros(1, 1).int(), torch.ones(1).int(), torch.randn(1, 3, 2)
    where, state = torch.zeros(2, 1, 8).int(), torch.zeros(1, 2, 64, 64)
    return {
        "v": lambda: libattn.mha_fwd(x, x, n(x)),
        "sinks": lambda: libattn.mha_fwd(x, x, x, sinks=n(torch.ones(2))),
        "lse_partial": lambda: libattn.split_combine(x[None], n(lse[None]), x, lse),
        "k_cache": lambda: libattn.mla_decode(q, n(cache), table, lens),
        "attn_sink": lambda: libattn.mla_sparse_fwd(
            q[0].expand(2, 2, 576), cache[0], where, 0.1, attn_sink=n(torch.ones(2))
        ),
        "beta": lambda: libattn.kda_fwd(x, x, x, x, n(beta), 0.1, -5.0),
        "final_state": lambda: libattn.kda_fwd(x, x, x, x, beta, 0.1, -5.0, final_state=n(state)),
        "state": lambda: libattn.kda_step(x, x, x, x, beta, 0.1, -5.0, n(state)),
        "kv": lambda: libattn.mla_cache_quantize(n(cache[0, :, 0]), torch.zeros(1, 64, 1, 656).byte()),
    }


@pytest.mark.parametrize("name", negated_calls())
def test_a_negated_view_is_refused_not_misread(name):
    """DLPack does not carry torch's negative bit: without a check the sign would be lost."""
    with pytest.raises(ValueError, match=f"^{name}: expected a plain tensor.*negated view"):
        negated_calls()[name]()


# ---- threads and forks ---------------------------------------------------------------------------------


def test_many_threads_at_once():
    cases = [torch.randn(3, 1, 40 + 7 * i, 4, 64).bfloat16().unbind(0) for i in range(6)]
    want = [mha.mha_fwd(*case)[0] for case in cases]
    wrong = []

    def work(turn):
        for i in range(30):
            j = (i + turn) % len(cases)
            if not torch.equal(mha.mha_fwd(*cases[j])[0], want[j]):
                wrong.append(j)
            try:
                mha.mha_fwd(*cases[j], num_splits=300 + turn)
            except errors.ArgumentError as error:
                if f"got {300 + turn}" not in str(error):
                    wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_threads_workspace_ends_with_it():
    code = """
        import threading, torch
        from libattn import mha
        q = torch.randn(1, 512, 8, 64).bfloat16()
        def size():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        def work():
            mha.mha_fwd(q, q, q, num_splits=8)  # over 8 MB of partial results
        sizes = []
        for _ in range(60):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            sizes.append(size())
        assert sizes[-1] - sizes[9] < 64 << 20, [s >> 20 for s in sizes]
    """
    done = python("-c", textwrap.dedent(code), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr


def test_fork():
    """Bytes are compared, as torch's own threads do not outlive a fork."""
    code = """
        import os, signal, torch
        from libattn import mha
        q = torch.randn(2, 300, 8, 64).bfloat16()
        def bits():
            return mha.mha_fwd(q, q, q)[0].view(torch.int16).numpy().tobytes()
        want = bits()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if bits() == want else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert bits() == want
    """
    done = python("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr


# ---- loading and versions --------------------------------------------------------------------------------


def test_versions_agree():
    assert _native.binding.get_function("version")() == libattn.__version__
    assert _native.core.attn_version().decode() == libattn.__version__


def test_parts_of_different_versions_are_named():
    _native.check_versions("1", "1", "1")
    with pytest.raises(
        ImportError, match="libattn.so is 2, libattn_ffi.so is 1, the Python package libattn is 3"
    ):
        _native.check_versions("2", "1", "3")


STUB = """
    const char *attn_version(void) { return "0.0.9"; }
    const char *attn_last_error(void) { return ""; }
"""


def build_stub(folder: Path, *flags) -> None:
    """A libattn.so of version 0.0.9 beside the real binding, which finds every name it needs there."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    names = sorted(set(re.findall(r"^attn_\w+$", abi.LIST.read_text(), re.MULTILINE)))
    rest = [f"int {name}(void) {{ return 0; }}" for name in names if f"{name}(" not in STUB]
    (folder / "stub.c").write_text("\n".join([STUB, *rest]))
    soname = "-Wl,-soname,libattn.so.0"
    where = folder / "libattn.so"
    subprocess.run(["gcc", "-shared", "-fPIC", soname, folder / "stub.c", "-o", where, *flags], check=True)
    shutil.copy(_native.find("libattn_ffi.so"), folder)


def test_another_cores_version_is_refused(tmp_path):
    build_stub(tmp_path)
    done = python("-c", "import libattn", ATTN_LIB_DIR=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: libattn: libattn.so is version 0.0.9, libattn_ffi.so 0.1.0"), last


def test_a_missing_openmp_is_explained(tmp_path):
    other = tmp_path / "libgomp.so.77"
    (tmp_path / "gomp.c").write_text("int gomp_stub(void) { return 0; }")
    name = "-Wl,-soname,libgomp.so.77"
    subprocess.run(["gcc", "-shared", "-fPIC", name, tmp_path / "gomp.c", "-o", other], check=True)
    build_stub(tmp_path, "-Wl,--no-as-needed", other)
    other.unlink()
    done = python("-c", "import flash_attn_interface", ATTN_LIB_DIR=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: libattn: cannot load") and "apt install libgomp1" in last


def test_a_missing_library_is_explained(tmp_path):
    done = python("-c", "import flash_attn_interface", ATTN_LIB_DIR=tmp_path)
    assert "ImportError: libattn: libattn.so is not in" in done.stderr.splitlines()[-1]


def test_torch_and_libattn_share_one_openmp():
    assert len(_native.openmp_runtimes()) == 1


# ---- python -m libattn --------------------------------------------------------------------------------


def test_report():
    done = python("-m", "libattn")
    assert done.stderr == ""
    lines = {line[:22].strip(): line[22:] for line in done.stdout.splitlines() if line[:22].strip()}
    assert lines["libattn"].startswith(libattn.__version__)
    assert lines["CPU rung"].split()[0] in ("c", "avx2", "avx512", "avx512bf16", "amx")
    assert "flash_attn_3 3" in lines["flash_attn_interface"]
    assert lines["flash_mla"].startswith("flash_mla 1")
    assert lines.keys() >= {"GPUs", "kernels", "MATE", "OpenMP", "tvm_ffi", "flash_mla", "flash_kda"}
    capped = python("-m", "libattn", ATTN_CPU="c").stdout
    assert "c (ATTN_CPU=c)" in capped
    assert "(ATTN_CPU=avx3 is none of c, avx2, " in python("-m", "libattn", ATTN_CPU="avx3").stdout


def test_report_into_a_closed_pipe():
    """`python -m libattn | head -1`: no traceback."""
    command = f"{sys.executable} -m libattn | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("libattn ") and done.stderr == ""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "libattn"], stdout=closed, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and done.stderr == ""


def test_report_without_the_library(tmp_path):
    done = python("-m", "libattn", ATTN_LIB_DIR=tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    assert "not usable            libattn: libattn.so is not in" in done.stdout
    assert "flash_attn_interface" in done.stdout


def test_report_names_a_foreign_wheel(tmp_path):
    (tmp_path / "flash_mla").mkdir()
    (tmp_path / "flash_mla" / "__init__.py").write_text("")
    info = tmp_path / "official_mla-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: official-mla\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("flash_mla\n")
    (info / "RECORD").write_text("flash_mla/__init__.py,,\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = python("-m", "libattn", PYTHONPATH=path)
    assert done.returncode == 1
    assert "official-mla 1.0 is not libattn's" in done.stdout
    assert "pip uninstall -y official-mla" in done.stdout


def with_path(folder):
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def test_report_names_a_wheel_for_another_libattn(tmp_path):
    info = tmp_path / "flash_attn_3-3.0.0.dist-info"
    info.mkdir()
    (tmp_path / "flash_attn_interface.py").write_text("")
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: flash_attn_3\nVersion: 3.0.0\nRequires-Dist: libattn==0.0.9\n"
    )
    (info / "top_level.txt").write_text("flash_attn_interface\n")
    (info / "RECORD").write_text("flash_attn_interface.py,,\n")
    done = python("-m", "libattn", PYTHONPATH=with_path(tmp_path))
    assert done.returncode == 1, done.stdout
    assert f"flash_attn_3 3.0.0 needs libattn 0.0.9, here is {libattn.__version__}" in done.stdout


def test_report_names_a_stray_file(tmp_path):
    stray = tmp_path / "flash_attn_interface.py"
    stray.write_text("")
    done = python("-m", "libattn", PYTHONPATH=with_path(tmp_path))
    assert done.returncode == 1, done.stdout
    assert f"{stray} shadows flash_attn_3 3" in done.stdout
