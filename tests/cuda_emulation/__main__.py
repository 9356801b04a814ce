"""`python -m tests.cuda_emulation [plain|race|asan|debug]` builds csrc/ and prints the module's path."""

import sys

from .build import module

print(module(*sys.argv[1:2]))
