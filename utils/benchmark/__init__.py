"""``tool.py --tools bench`` (`bench`), and what it measures: network, propagation, the whole way, training."""
