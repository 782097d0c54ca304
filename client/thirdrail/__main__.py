# SPDX-License-Identifier: Apache-2.0
"""`python -m thirdrail`: the same as the command `thirdrail`."""

from thirdrail.cli import main

if __name__ == "__main__":
    main()
