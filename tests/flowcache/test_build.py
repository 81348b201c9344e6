"""The programs that are kept are those of the source: whoever changes the source compiles it anew.

The object is compiled again, and compared instruction by instruction. Clang has its own mind about
registers and jumps, and another with each release: another release than the one that the object was
compiled with says nothing about single instructions. With it only the outlines are compared:
whether it compiles, and which programs and maps there are. What the programs do, `test_programs.py`
tries.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from ctypes import c_char_p, c_uint32, c_void_p
from pathlib import Path

import pytest

from nfmasq.flowcache.programs import OBJECT
from tests.programs import program

SCRIPT = Path(__file__).parents[2] / "script" / "build-flow-cache"

CLANG = 14
"""The release of clang that has compiled the object: that of Debian 12."""

DEFINED = "type", "key_size", "value_size", "max_entries", "map_flags"
CHANGED = "the source has changed: run script/build-flow-cache"


@pytest.fixture(scope="module")
def anew(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the programs anew."""
    for name, package in (("clang", "clang"), ("llvm-objdump", "llvm")):
        program(name, package)
    compiled = tmp_path_factory.mktemp("compiled") / "flow_cache.bpf.o"
    subprocess.run([SCRIPT, compiled], check=True)
    return compiled


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def release_of_clang() -> int:
    found = re.search(r"version (\d+)", output_of("clang", "--version"))
    assert found is not None
    return int(found[1])


def instructions(path: Path) -> list[str]:
    """List the instructions of all programs, and the maps that they refer to."""
    lines = output_of("llvm-objdump", "-d", "-r", "--no-show-raw-insn", path).splitlines()
    return [line for line in lines if "file format" not in line]


def programs_of(path: Path) -> set[str]:
    symbols = output_of("llvm-readelf", "-s", path)
    return set(re.findall(r"FUNC +GLOBAL +\S+ +\S+ (\S+)", symbols))


def maps_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Return type, sizes of key and value in bytes, room and flags of each map, by its name."""
    library = ctypes.CDLL("libbpf.so.1")
    library.bpf_object__open_file.argtypes = c_char_p, c_void_p
    library.bpf_object__open_file.restype = library.bpf_object__next_map.restype = c_void_p
    library.bpf_object__next_map.argtypes = c_void_p, c_void_p
    library.bpf_object__close.argtypes = library.bpf_map__name.argtypes = (c_void_p,)
    library.bpf_map__name.restype = c_char_p
    for value in DEFINED:
        function = getattr(library, f"bpf_map__{value}")
        function.restype, function.argtypes = c_uint32, (c_void_p,)
    opened = library.bpf_object__open_file(os.fsencode(path), None)
    assert opened
    maps, each = {}, library.bpf_object__next_map(opened, None)
    while each:
        values = tuple(getattr(library, f"bpf_map__{value}")(each) for value in DEFINED)
        maps[library.bpf_map__name(each).decode()] = values
        each = library.bpf_object__next_map(opened, each)
    library.bpf_object__close(opened)
    return maps


def test_the_source_has_the_programs_and_the_maps_that_are_kept(anew: Path) -> None:
    assert programs_of(anew) == programs_of(OBJECT), CHANGED
    assert maps_of(anew) == maps_of(OBJECT), CHANGED
    assert len(programs_of(OBJECT)) == 10
    assert len(maps_of(OBJECT)) == 7


def test_the_source_has_the_instructions_that_are_kept(anew: Path) -> None:
    release = release_of_clang()
    if release != CLANG:
        other = f"clang {release} compiles to other instructions than clang {CLANG}"
        if os.environ.get("CI") == "true":
            pytest.fail(other)
        pytest.skip(other)
    assert instructions(anew) == instructions(OBJECT), CHANGED


def test_what_is_kept_tells_nothing_of_the_machine_that_compiled_it() -> None:
    kept = OBJECT.read_bytes()
    assert b"./flow_cache.bpf.c" in kept
    assert not re.search(rb"/(home|root|work|var|tmp|usr)/", kept)
