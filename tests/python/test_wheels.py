# SPDX-License-Identifier: MIT
"""`make wheel`: what is in each wheel, and that a fresh environment installs them by the README's line
and computes attention with them, on the oldest and the newest tvm-ffi that they allow.

Installing needs the package index, for torch too unless this Python's own torch serves."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import build_tree
import pytest
import torch
import wheel_tag
from build_tree import ROOT

OLDEST_TVM_FFI = "0.1.11"
VERSION = re.search(r'ATTN_VERSION_STRING "(.*)"', (ROOT / "include/attn/attn.h").read_text())[1]

SMOKE = """
import torch, flash_attn_interface, flash_attn_3, flash_attn_config, libattn, tvm_ffi
import importlib.util, sys
assert importlib.util.find_spec("flash_attn") is None
assert sys.prefix in libattn.__file__, libattn.__file__
q, k, v = (torch.randn(2, s, h, 64) for s, h in ((5, 8), (300, 2), (300, 2)))
out = flash_attn_interface.flash_attn_func(q, k, v)
sdpa = torch.nn.functional.scaled_dot_product_attention
want = sdpa(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(1, 2)
torch.testing.assert_close(out, want)

import flash_kda, flash_kda_C
q, k, v, g = torch.randn(4, 1, 20, 2, 64)
zeros, state = torch.zeros(2), torch.zeros(1, 2, 64, 64)
out = torch.full_like(v, torch.nan)
flash_kda.fwd(q, k, v, g, q[..., 0], 0.125, out, zeros, torch.zeros(2, 64), -5.0, final_state=state)
assert out.isfinite().all() and state.isfinite().all() and state.any()

import flash_mla, flash_mla.cache, flash_mla.kernels.triton_flash_mla, flash_mla.layer
import flash_mla.ops.interface
q, k = torch.randn(1, 1, 4, 576), torch.randn(2, 64, 1, 576)
table, lens = torch.tensor([[1, 0]]).int(), torch.tensor([100]).int()
out, lse = flash_mla.flash_mla_with_kvcache(q, k, table, lens, 512, *flash_mla.get_mla_metadata(), 0.1)
rows = torch.cat((k[1], k[0]))[:100, 0]
want = (q[0, 0] @ rows.T * 0.1).softmax(-1) @ rows[:, :512]
torch.testing.assert_close(out[0, 0], want, atol=1e-5, rtol=1e-5)
print(tvm_ffi.__version__)
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dist")
    build_tree.run("tools/wheels.sh", folder)
    return {path.name.split("-")[0]: path for path in folder.glob("*.whl")}


def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def metadata(wheel: Path) -> str:
    archive = zipfile.ZipFile(wheel)
    return archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()


def test_one_wheel_a_distribution(wheels):
    assert wheels.keys() == {p.parent.name for p in (ROOT / "python").glob("*/pyproject.toml")}
    assert wheels.keys() >= {"libattn", *OWNED}


def test_the_native_wheel_suits_every_python_and_the_glibc_it_names(wheels):
    name = wheels["libattn"].name
    assert re.fullmatch(rf"libattn-{VERSION}-py3-none-manylinux_2_\d+_x86_64\.whl", name), name
    assert wheel_tag.platform_tag(wheels["libattn"]) in name


def test_the_native_wheel_holds_two_objects_and_no_openmp(wheels):
    objects = sorted(name for name in names(wheels["libattn"]) if ".so" in name)
    assert objects == ["libattn/libattn.so", "libattn/libattn_ffi.so"]


def test_the_other_wheels_are_pure_and_want_this_libattn(wheels):
    for name, wheel in wheels.items():
        if name != "libattn":
            assert wheel.name.endswith("-py3-none-any.whl")
            assert re.search(
                rf"^Requires-Dist: libattn ?={{2}} ?{VERSION}$", metadata(wheel), re.MULTILINE
            ), name


OWNED = {
    "flash_attn_3": {"flash_attn_interface.py", "flash_attn_config.py", "flash_attn_3"},
    "flash_kda": {"flash_kda", "flash_kda_C.py"},
    "flash_mla": {"flash_mla"},
}


@pytest.mark.parametrize("name", OWNED)
def test_each_package_owns_its_names_and_no_others(name, wheels):
    tops = {path.split("/")[0] for path in names(wheels[name]) if ".dist-info" not in path}
    assert tops == OWNED[name]


def test_packages_have_the_official_major_versions(wheels):
    assert wheels["flash_attn_3"].name.startswith("flash_attn_3-3.")
    assert wheels["flash_mla"].name.startswith("flash_mla-1.")


def test_licence_and_notices_are_in_each_wheel(wheels):
    for wheel in wheels.values():
        inside = {Path(name).name for name in names(wheel) if ".dist-info/" in name}
        assert {"LICENSE", "NOTICE"} <= inside, wheel.name
        assert "License-Expression: MIT" in metadata(wheel)


def test_size(wheels):
    assert sum(wheel.stat().st_size for wheel in wheels.values()) <= 5 << 20


@pytest.fixture(scope="module")
def fresh(wheels, tmp_path_factory) -> Path:
    """The Python of a new environment into which `pip install dist/*.whl` went.  torch is the version
    these tests run with: this interpreter's own where .venv shares it, else from the index."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    shared = not Path(torch.__file__).is_relative_to(sys.prefix)
    base = str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    build_tree.run(base, "-m", "venv", *(["--system-site-packages"] if shared else []), folder)
    python = folder / "bin" / "python"
    if shared:  # as tools/venv.sh does
        (next(folder.glob("lib/*/site-packages")) / "shared.pth").write_text(
            str(Path(torch.__file__).parents[1])
        )
    torch_too = [] if shared else [f"torch=={torch.__version__.split('+')[0]}"]
    pip(python, *wheels.values(), *torch_too)
    return python


def pip(python: Path, *what):
    build_tree.run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile", *what)


def isolated(python: Path, *arguments) -> str:
    """Runs the fresh Python outside the repository and without this process's Python settings."""
    return build_tree.run(python, *arguments, env={"PYTHONPATH": "", "VIRTUAL_ENV": ""}, cwd=python.parent)


def test_fresh_environment_is_consistent(fresh):
    isolated(fresh, "-m", "pip", "check")


@pytest.mark.parametrize("wanted", ["newest", OLDEST_TVM_FFI])
def test_attention_in_a_fresh_environment(fresh, wanted):
    """One binding, compiled against one tvm-ffi, serves every 0.1.x; its source suits every 0.1.x."""
    pip(fresh, "-U", "apache-tvm-ffi>=0.1.11,<0.2" if wanted == "newest" else f"apache-tvm-ffi=={wanted}")
    found = isolated(fresh, "-c", SMOKE).strip()
    assert found.startswith(wanted) or wanted == "newest" and found != OLDEST_TVM_FFI
    headers = next(fresh.parents[1].glob("lib/*/site-packages/tvm_ffi/include"))
    includes = [f"-I{path}" for path in (ROOT / "include", ROOT / "src", headers, headers / "dlpack")]
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    build_tree.run("cc", *flags, *includes, *(ROOT / "src/ffi").glob("*.c"))
    report = isolated(fresh, "-m", "libattn")
    assert VERSION in report
    for name in OWNED:
        assert re.search(rf"^\S+ +{name} \d", report, re.MULTILINE), report


def test_without_the_openmp_run_time_the_import_says_so(fresh, tmp_path):
    """A file that is no library stands in front of libgomp.so.1; torch, which brings its own, is hidden."""
    (tmp_path / "libgomp.so.1").write_text("no library")
    hide_torch = "import sys; sys.modules['torch'] = None; import libattn"
    done = subprocess.run(
        [fresh, "-c", hide_torch],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"LD_LIBRARY_PATH": str(tmp_path)},
    )
    assert done.returncode and "libgomp" in done.stderr.splitlines()[-1]
