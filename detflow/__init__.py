"""What the services share, and the client of detflow."""

import os

# Every child process of detflow begins a new program, so gRPC need not survive a fork; its fork
# handlers can crash a child between fork and exec. It reads this when it is first imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
