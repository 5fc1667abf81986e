"""What `main.py` trains with: options, data in order, the network to start from, checkpoints, average, log."""
