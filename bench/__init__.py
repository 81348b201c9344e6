"""Benchmarks: `sudo ./script/bench` measures data paths side by side in one run.

| file | what it is |
| --- | --- |
| `accept.py`, `floor.py` | baselines that translate nothing |
| `dpkt_masquerade.py`, `scapy_masquerade.py` | baselines that masquerade, plainly |
| `baseline.py` | what these four share |
| `paths.py` | the data paths: how each is put into a lab |
| `traffic.py` | the programs that send, receive and time packets |
| `network.py` | what is measured of a path, with these programs and iperf3 |
| `flows.py` | datagrams spread over 1 to 1,000,000 flows that the flow cache knows |
| `table.py` | the engine's table without a network, from a thousand entries to a million |
| `expiry.py` | the round trip while 100,000 entries expire |
| `targets.py` | the ratios that must hold |
| `report.py`, `chart.py` | tables on the terminal and in Markdown, and a chart |
| `__main__.py` | one run, from beginning to end |
"""
