"""Everything about a running nfmasq that touches the machine: the queue, threads, sockets."""
