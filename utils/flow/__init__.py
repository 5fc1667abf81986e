"""``tool.py --tools flow`` (`prepare`): optical flow by RAFT or DIS, and how it is stored."""
