"""The installed library as another project meets it: through pkg-config, through find_package, and by the names in the archive."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import PROGRAM

BUILD = Path(PROGRAM).resolve().parent

SOURCE = """#include <arrowquant/base.h>
#include <arrowquant/pipeline.h>
#include <stdio.h>
#include <string.h>

int main(void) {
    if (strcmp(aq_version(), AQ_VERSION) != 0) return 1;
    printf("version %s\\n", aq_version());
    return 0;
}
"""

PROJECT = """cmake_minimum_required(VERSION 3.24)
project(t C)
find_package(arrowquant CONFIG REQUIRED)
add_executable(t t.c)
target_link_libraries(t arrowquant::arrowquant)
"""


def run(*command, **environment):
    process = subprocess.run([str(c) for c in command], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, f"{command}\n{process.stdout}{process.stderr}"
    return process.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """The build folder installed, then moved: nothing in it may know where it was put."""
    first = tmp_path_factory.mktemp("install") / "first"
    run("cmake", "--install", BUILD, "--prefix", first)
    return first.rename(first.with_name("moved"))


def only(prefix, name):
    (found,) = prefix.rglob(name)
    return found


@pytest.fixture
def source(tmp_path):
    (tmp_path / "t.c").write_text(SOURCE)
    return tmp_path / "t.c"


def test_a_program_builds_through_pkg_config(prefix, source):
    pc = only(prefix, "arrowquant.pc")
    flags = run("pkg-config", "--cflags", "--libs", "arrowquant", PKG_CONFIG_PATH=str(pc.parent)).split()
    program = source.with_name("t")
    run("cc", source, "-o", program, *flags)
    out = run(program, LD_LIBRARY_PATH=str(pc.parent.parent))
    assert out == f"version {run('pkg-config', '--modversion', pc).strip()}\n"


def test_pkg_config_names_the_prefix_it_lies_in(prefix):
    pc = only(prefix, "arrowquant.pc")
    for variable, expected in {"prefix": prefix, "libdir": pc.parent.parent, "includedir": prefix / "include"}.items():
        assert Path(run("pkg-config", f"--variable={variable}", pc).strip()).resolve() == expected


def test_pkg_config_names_what_a_static_link_needs(prefix):
    flags = run("pkg-config", "--static", "--libs", only(prefix, "arrowquant.pc")).split()
    assert {"-larrowquant", "-ljansson", "-lyaml", "-lxxhash", "-lzstd", "-lcrypto", "-lz", "-llz4", "-lpthread", "-lm"} <= set(flags)


def test_a_program_builds_through_find_package(prefix, source):
    (source.parent / "CMakeLists.txt").write_text(PROJECT)
    build = source.parent / "build"
    run("cmake", "-S", source.parent, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", build)
    assert run(build / "t").startswith("version ")


def test_every_global_symbol_of_the_archive_begins_with_aq(prefix):
    """The archive holds our objects alone: a name without the prefix could meet one of the program that links it."""
    lines = run("nm", "-g", "--defined-only", only(prefix, "libarrowquant.a")).splitlines()
    names = {fields[2] for fields in map(str.split, lines) if len(fields) == 3}
    assert "aq_version" in names
    assert sorted(n for n in names if not n.startswith("aq_")) == []
