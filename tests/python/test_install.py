# SPDX-License-Identifier: MIT
"""`make install`: the installed tree serves a C program by CMake and by pkg-config, wherever it is moved."""

import shutil
import subprocess

import pytest
from build_tree import ROOT, run


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An installed tree that was moved after the installation."""
    folder = tmp_path_factory.mktemp("install")
    run("make", "install", f"PREFIX={folder / 'first'}")
    (folder / "first").rename(folder / "moved")
    return folder / "moved"


def check_example(output: str):
    assert "kernel attn_mha_fwd_fp32_" in output
    assert "largest difference to plain C" in output


def test_what_is_installed(installed):
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if not path.is_dir()}
    library = {name for name in files if name.startswith("lib") and ".so" in name}
    assert {name.split("/")[-1] for name in library} == {"libattn.so", "libattn.so.0", "libattn.so.0.1.0"}
    assert {"include/attn/attn.h", "include/attn/dlpack.h"} <= files
    assert {name.split("/")[-1] for name in files - library} == {
        "attn.h",
        "dlpack.h",
        "attn.pc",
        "attnConfig.cmake",
        "attnConfigVersion.cmake",
        "attnTargets.cmake",
        "attnTargets-release.cmake",
    }


def test_example_by_find_package(installed, tmp_path):
    run("cmake", "-S", ROOT / "examples", "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", tmp_path)
    check_example(run(tmp_path / "attention"))


def test_a_newer_minor_version_is_not_found(installed, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(x LANGUAGES C)\nfind_package(attn 0.2 REQUIRED)\n"
    )
    done = subprocess.run(
        ["cmake", "-S", tmp_path, "-B", tmp_path / "b", f"-DCMAKE_PREFIX_PATH={installed}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode and "version: 0.1.0" in done.stderr


@pytest.mark.skipif(not shutil.which("pkg-config"), reason="no pkg-config")
def test_example_by_pkg_config(installed, tmp_path):
    folder = next(installed.rglob("attn.pc")).parent
    flags = run("pkg-config", "--cflags", "--libs", "attn", env={"PKG_CONFIG_PATH": folder}).split()
    run(
        "cc",
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Werror",
        ROOT / "examples/attention.c",
        *flags,
        "-lm",
        "-o",
        tmp_path / "attention",
    )
    libraries = next(installed.rglob("libattn.so")).parent
    check_example(run(tmp_path / "attention", env={"LD_LIBRARY_PATH": libraries}))


@pytest.mark.parametrize("compiler, standard", [("cc", "c11"), ("c++", "c++11"), ("clang", "c11")])
def test_header_compiles_alone(installed, compiler, standard, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    source = tmp_path / f"x.{'cc' if '+' in standard else 'c'}"
    source.write_text("#include <attn/attn.h>\nint main(void) { return attn_version()[0] == 0; }\n")
    run(
        compiler,
        f"-std={standard}",
        "-Wall",
        "-Wextra",
        "-pedantic",
        "-Werror",
        "-fsyntax-only",
        "-isystem",
        installed / "include",
        source,
    )
