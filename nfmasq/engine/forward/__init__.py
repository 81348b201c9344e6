"""Sessions from the outside in: forwarded and triggered ports, and the servers behind them."""
