"""The flow cache: packets of known flows are rewritten in the kernel, by eBPF programs.

| file | what it is |
| --- | --- |
| `flow_cache.bpf.c` | the programs: how a packet passes through the kernel, and why |
| `flow_cache.bpf.o` | the programs, compiled: `script/build-flow-cache` makes it anew |
| `libbpf.py` | what is used of the C library libbpf, and nothing else |
| `programs.py` | the programs and their maps, loaded into the kernel |
| `flows.py` | `Flows`: the flows in the kernel's map; what the engine knows as its cache |
| `attachment.py` | the programs attached to interfaces, as these come and go |
| `marks.py` | what on this machine reads marks, and would be misled by ours |
| `service.py` | `KernelFlowCache`: all of this for a running nfmasq; why it is off where it is |

Which flows go in, and when they leave, the engine decides (`engine/cached.py`). It knows nothing of
what is here.
"""
