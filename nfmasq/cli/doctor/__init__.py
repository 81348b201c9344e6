"""`nfmasq doctor`: what is missing or wrong on this machine.

Each function that looks at a part of the machine yields findings: what is so and, where something
is wrong, what to do. A problem keeps nfmasq from working or lets something go wrong; a warning is
about what may become a problem; a note is good to know. What cannot be seen, for example without
privileges, is a note and not a problem.

`command.py` has the order in which doctor looks. `machine.py` has the kernel and its settings,
`rules.py` our rules, `flow_cache.py` the flow cache, `network.py` the interfaces, `routes.py` the
way of a packet as the kernel routes it, `passage.py` what the filter does to it (`rehearsal.py`
finds that out, from the rules that `tables.py` reads), `translations.py` the NAT of others, and
`ports.py` the masquerade ports.
"""
