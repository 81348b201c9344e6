"""What nfmasq uses of the C library libbpf, version 1: objects, maps, and programs at interfaces.

Each function here is a function of the library, with its errors as OSError. libbpf's own messages
are not printed, since people are told in one line what is wrong and what to do.
"""

from __future__ import annotations

import ctypes
import errno
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

INGRESS, EGRESS = 1, 2
"""Where a program is attached to an interface."""

ANY, CREATE = 0, 1
"""How an element of a map is set: whether it is there or not, or only where it is not."""

_REPLACE = 1


class _Hook(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("ifindex", c_int),
        ("attach_point", c_int),
        ("parent", c_uint32),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("prog_fd", c_int),
        ("flags", c_uint32),
        ("prog_id", c_uint32),
        ("handle", c_uint32),
        ("priority", c_uint32),
    )


class Libbpf:
    """The library, loaded. Raises OSError where it is not installed."""

    def __init__(self) -> None:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
        library.libbpf_set_print.restype = c_void_p
        library.libbpf_set_print(None)
        for name, result, *arguments in (
            ("bpf_object__open_file", c_void_p, c_char_p, c_void_p),
            ("bpf_object__load", c_int, c_void_p),
            ("bpf_object__close", None, c_void_p),
            ("bpf_object__find_map_by_name", c_void_p, c_void_p, c_char_p),
            ("bpf_object__find_program_by_name", c_void_p, c_void_p, c_char_p),
            ("bpf_map__fd", c_int, c_void_p),
            ("bpf_map__set_max_entries", c_int, c_void_p, c_uint32),
            ("bpf_program__fd", c_int, c_void_p),
            ("bpf_map_update_elem", c_int, c_int, c_void_p, c_void_p, ctypes.c_uint64),
            ("bpf_map_lookup_elem", c_int, c_int, c_void_p, c_void_p),
            ("bpf_map_lookup_and_delete_elem", c_int, c_int, c_void_p, c_void_p),
            ("bpf_map_delete_elem", c_int, c_int, c_void_p),
            ("bpf_tc_hook_create", c_int, POINTER(_Hook)),
            ("bpf_tc_hook_destroy", c_int, POINTER(_Hook)),
            ("bpf_tc_attach", c_int, POINTER(_Hook), POINTER(_Options)),
            ("bpf_tc_detach", c_int, POINTER(_Hook), POINTER(_Options)),
            ("bpf_tc_query", c_int, POINTER(_Hook), POINTER(_Options)),
            ("libbpf_num_possible_cpus", c_int),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library: Any = library
        # Called for single flows, by the thread that handles packets: without a wrapper.
        self.update = library.bpf_map_update_elem
        self.look_up = library.bpf_map_lookup_elem
        self.take = library.bpf_map_lookup_and_delete_elem
        self.delete = library.bpf_map_delete_elem

    def cpus(self) -> int:
        """Return how many values an element of a map with a value for each processor has."""
        return _checked(self._library.libbpf_num_possible_cpus())

    def open(self, path: Path) -> Object:
        """Open an object file. Raises OSError."""
        return Object(self._library, path)

    def attach(
        self, interface: int, point: int, program: int, *, handle: int, priority: int
    ) -> bool:
        """Attach a program to an interface, in the place of a program with this handle.

        `program` is a file descriptor. Returns whether the interface has got its place for programs
        (the qdisc `clsact`) by this call. Raises OSError.
        """
        hook = _hook(interface, INGRESS | EGRESS)
        made = self._library.bpf_tc_hook_create(byref(hook))
        if made not in (0, -errno.EEXIST):
            _checked(made)
        hook = _hook(interface, point)
        options = _options(prog_fd=program, flags=_REPLACE, handle=handle, priority=priority)
        _checked(self._library.bpf_tc_attach(byref(hook), byref(options)))
        return bool(made == 0)

    def attached(self, interface: int, point: int, *, handle: int, priority: int) -> int | None:
        """Return the number of the program with this handle, or None where there is none."""
        hook, options = _hook(interface, point), _options(handle=handle, priority=priority)
        if self._library.bpf_tc_query(byref(hook), byref(options)) < 0:
            return None
        return int(options.prog_id)

    def detach(self, interface: int, point: int, *, handle: int, priority: int) -> bool:
        """Detach the program with this handle; returns whether there was one."""
        hook, options = _hook(interface, point), _options(handle=handle, priority=priority)
        return bool(self._library.bpf_tc_detach(byref(hook), byref(options)) == 0)

    def take_place_away(self, interface: int) -> None:
        """Remove an interface's place for programs, with all programs that are in it."""
        self._library.bpf_tc_hook_destroy(byref(_hook(interface, INGRESS | EGRESS)))


class Object:
    """An object file's maps and programs; they are in the kernel after `load`, until `close`."""

    def __init__(self, library: Any, path: Path) -> None:
        self._library = library
        self._object = library.bpf_object__open_file(os.fsencode(path), None)
        if not self._object:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))

    def set_size(self, name: str, elements: int) -> None:
        """Give a map room for this many elements; before `load`. Raises OSError."""
        _checked(self._library.bpf_map__set_max_entries(self._map(name), elements))

    def load(self) -> None:
        """Put the maps and programs into the kernel. Raises OSError."""
        _checked(self._library.bpf_object__load(self._object))

    def map(self, name: str) -> int:
        """Return a map's file descriptor. Raises OSError."""
        return _checked(self._library.bpf_map__fd(self._map(name)))

    def program(self, name: str) -> int:
        """Return a program's file descriptor. Raises OSError."""
        found = self._library.bpf_object__find_program_by_name(self._object, name.encode())
        return _checked(self._library.bpf_program__fd(found) if found else -errno.ENOENT)

    def close(self) -> None:
        """Close the file descriptors. Programs that are attached stay in the kernel."""
        self._library.bpf_object__close(self._object)

    def _map(self, name: str) -> Any:
        found = self._library.bpf_object__find_map_by_name(self._object, name.encode())
        if not found:
            raise OSError(errno.ENOENT, f"no map {name}")
        return found


def _hook(interface: int, point: int) -> _Hook:
    return _Hook(sz=ctypes.sizeof(_Hook), ifindex=interface, attach_point=point)


def _options(**values: int) -> _Options:
    return _Options(sz=ctypes.sizeof(_Options), **values)


def _checked(result: int) -> int:
    """Return a result of libbpf. Raises OSError where it is a negative error number."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
