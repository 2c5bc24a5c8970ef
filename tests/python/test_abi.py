# SPDX-License-Identifier: MIT
"""What the built objects show the world: names, libraries, instruction sets.  The checks are those of
`make abi`; here they are also shown to find what they are for."""

import shutil
import subprocess

import abi
import build_tree
import isa
import pytest


@pytest.fixture(scope="module")
def release_build():
    return build_tree.release()


def test_exported_names_and_needed_libraries_are_as_listed(release_build):
    assert abi.faults(release_build) == []


def test_a_name_that_the_list_lacks_is_found(release_build, tmp_path, monkeypatch):
    shorter = tmp_path / "abi.txt"
    shorter.write_text(abi.LIST.read_text().replace("attn_version\n", ""))
    monkeypatch.setattr(abi, "LIST", shorter)
    assert any("attn_version" in fault for fault in abi.faults(release_build))


def test_every_object_keeps_to_its_rung(release_build):
    objects = isa.objects(release_build)
    assert {isa.RUNGS[isa.rung_of(path)] for path in objects} >= {"baseline", "avx2", "avx512"}
    assert [line for path in objects for line in isa.leaks(path)] == []
    assert isa.shared_names(objects) == []


SOURCE = """
#include <immintrin.h>
#if WHAT == 1
void attn_x(float *a) { _mm256_storeu_ps(a, _mm256_loadu_ps(a + 8)); }
#elif WHAT == 2
void attn_x(float *a) { _mm512_storeu_ps(a, _mm512_maskz_loadu_ps(3, a + 16)); }
#elif WHAT == 3
void attn_x(__m512 *a, __m512bh *b) { *a = _mm512_dpbf16_ps(*a, b[0], b[1]); }
#elif WHAT == 4
void attn_x(void *a) { _tile_loadd(0, a, 64); }
#elif WHAT == 5
void attn_x(__m512i *a) { *a = _mm512_dpbusd_epi32(*a, a[1], a[2]); }
#endif
"""
FLAGS = ["-mavx2", "-mavx512f", "-mavx512bf16", "-mamx-tile", "-mavx512vnni"]


@pytest.mark.parametrize(
    "what, name, leaks",
    [
        (1, "x_avx2", False),
        (1, "x_ref", True),
        (2, "x_avx512", False),
        (2, "x_avx2", True),
        (3, "x_avx512bf16", False),
        (3, "x_avx512", True),
        (4, "x_amx", False),
        (4, "x_avx512bf16", True),
        (5, "x_amx", True),
    ],
)
def test_an_instruction_outside_its_rung_is_found(what, name, leaks, tmp_path):
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    source, built = tmp_path / f"{name}.c", tmp_path / f"{name}.c.o"
    source.write_text(SOURCE)
    subprocess.run(["cc", "-O2", f"-DWHAT={what}", *FLAGS, "-c", source, "-o", built], check=True)
    assert bool(isa.leaks(built)) == leaks


def test_a_name_without_our_prefix_is_found(tmp_path):
    source, built = tmp_path / "x.c", tmp_path / "x.c.o"
    source.write_text(
        "void attn_ours(void) {} void theirs(void) {} static void quiet(void) {}"
        " void *use(void) { return (void *)quiet; }"
    )
    subprocess.run(["cc", "-c", source, "-o", built], check=True)
    assert [line.split()[1] for line in isa.shared_names([built])] == ["theirs", "use"]
