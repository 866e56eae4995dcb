"""What gRPC reads from the environment when it is imported, so this module comes before it. What is set already stays.

Its fork handlers make a forked child hang or crash now and then, and are of no use: a client does not cross a fork.
A connection that goes away is not news for a program's stderr: the client connects again, or says so by an error.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
